"""A key that is made in the machine, and the request for its certificate (RFC 2986).

Both are the work of OpenSSL's libcrypto, which is here because Python's ssl has it; nothing else in a machine
can sign. Python's own module has no function for either, so the library is called directly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from .errors import GuestError

# openssl/evp.h, openssl/obj_mac.h, openssl/x509v3.h
_EVP_PKEY_EC = 408
_NID_SUBJECT_ALT_NAME = 85
_GEN_DNS, _GEN_URI = 2, 6
_REQUEST_VERSION = 0  # "v1", RFC 2986, section 4.1
_UTF8 = 0x1000  # MBSTRING_UTF8
_BIO_CTRL_INFO = 3
_LONGEST_NAME = 64  # ub-common-name, RFC 5280, appendix A.1

_P, _I, _L, _S = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
# What each function takes, after the type of what it returns.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "ASN1_STRING_set": (_I, _P, _S, _I),
    "ASN1_STRING_type_new": (_P, _I),
    "BIO_ctrl": (_L, _P, _I, _L, _P),
    "BIO_free": (_I, _P),
    "BIO_new": (_P, _P),
    "BIO_s_secmem": (_P,),
    "EVP_PKEY_CTX_ctrl_str": (_I, _P, _S, _S),
    "EVP_PKEY_CTX_free": (None, _P),
    "EVP_PKEY_CTX_new_id": (_P, _I, _P),
    "EVP_PKEY_free": (None, _P),
    "EVP_PKEY_keygen": (_I, _P, _P),
    "EVP_PKEY_keygen_init": (_I, _P),
    "EVP_sha256": (_P,),
    "GENERAL_NAMES_free": (None, _P),
    "GENERAL_NAME_new": (_P,),
    "GENERAL_NAME_set0_value": (None, _P, _I, _P),
    "OPENSSL_sk_new_null": (_P,),
    "OPENSSL_sk_free": (None, _P),
    "OPENSSL_sk_push": (_I, _P, _P),
    "PEM_write_bio_PKCS8PrivateKey": (_I, _P, _P, _P, _P, _I, _P, _P),
    "PEM_write_bio_X509_REQ": (_I, _P, _P),
    "X509V3_EXT_i2d": (_P, _I, _I, _P),
    "X509_EXTENSION_free": (None, _P),
    "X509_NAME_add_entry_by_txt": (_I, _P, _S, _I, _S, _I, _I, _I),
    "X509_REQ_add_extensions": (_I, _P, _P),
    "X509_REQ_free": (None, _P),
    "X509_REQ_get_subject_name": (_P, _P),
    "X509_REQ_new": (_P,),
    "X509_REQ_set_pubkey": (_I, _P, _P),
    "X509_REQ_set_version": (_I, _P, _L),
    "X509_REQ_sign": (_I, _P, _P, _P),
}
_IA5STRING = 22  # V_ASN1_IA5STRING


class NoLibrary(GuestError):
    """The libcrypto of this Python can't be called."""


@cache
def _libcrypto() -> dict[str, Callable[..., Any]]:
    import _ssl

    # The functions of a library's own libraries are found through it (dlsym(3)); of a module that is part
    # of the program, through the program.
    library = ctypes.CDLL(getattr(_ssl, "__file__", None))
    functions = {}
    for name, (result, *arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise NoLibrary(
                f"no key can be made in this machine: the libcrypto of its Python shows no {name}"
            ) from None
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions


def _call(name: str, *arguments: Any) -> Any:
    """Call a function; those that return a number or a pointer return 0 where they have failed."""
    result = _libcrypto()[name](*arguments)
    if not result and _FUNCTIONS[name][0] is not None:
        raise GuestError(f"no key or request could be made: {name} of libcrypto failed")
    return result


@contextmanager
def _owned(made: int, free: str) -> Iterator[int]:
    try:
        yield made
    finally:
        _libcrypto()[free](made)


def make_request(names: Sequence[str]) -> tuple[bytes, bytes]:
    """Make a P-256 key and a request for a certificate with these names, and no others.

    Args:
        names: DNS names, and URIs, which are those with ``://``; ASCII.

    Returns:
        The key as PKCS#8 PEM, and the request as PEM.

    Raises:
        NoLibrary: see there.
        GuestError: libcrypto failed.
    """
    with _owned(_make_key(), "EVP_PKEY_free") as key, _owned(_call("X509_REQ_new"), "X509_REQ_free") as csr:
        _call("X509_REQ_set_version", csr, _REQUEST_VERSION)
        _call("X509_REQ_set_pubkey", csr, key)
        _add_subject(csr, names)
        _add_names(csr, names)
        _call("X509_REQ_sign", csr, key, _call("EVP_sha256"))
        private = _pem("PEM_write_bio_PKCS8PrivateKey", key, None, None, 0, None, None)
        return private, _pem("PEM_write_bio_X509_REQ", csr)


def _make_key() -> int:
    made = ctypes.c_void_p()
    with _owned(_call("EVP_PKEY_CTX_new_id", _EVP_PKEY_EC, None), "EVP_PKEY_CTX_free") as context:
        _call("EVP_PKEY_keygen_init", context)
        _call("EVP_PKEY_CTX_ctrl_str", context, b"ec_paramgen_curve", b"P-256")
        _call("EVP_PKEY_CTX_ctrl_str", context, b"ec_param_enc", b"named_curve")
        _call("EVP_PKEY_keygen", context, ctypes.byref(made))
    return int(made.value or 0)


def _add_subject(csr: int, names: Sequence[str]) -> None:
    """Say the first DNS name as the common name, as the host's own requests do, where it fits."""
    first = next((name for name in names if "://" not in name), "")
    if first and len(first) <= _LONGEST_NAME:
        subject = _call("X509_REQ_get_subject_name", csr)
        _call("X509_NAME_add_entry_by_txt", subject, b"CN", _UTF8, first.encode(), -1, -1, 0)


def _add_names(csr: int, names: Sequence[str]) -> None:
    # Not as text, "DNS:a,URI:b": a URI may contain a comma.
    with _owned(_call("OPENSSL_sk_new_null"), "GENERAL_NAMES_free") as general:
        for name in names:
            data = name.encode("ascii")
            text = _call("ASN1_STRING_type_new", _IA5STRING)
            _call("ASN1_STRING_set", text, data, len(data))
            one = _call("GENERAL_NAME_new")
            _libcrypto()["GENERAL_NAME_set0_value"](one, _GEN_URI if "://" in name else _GEN_DNS, text)
            _call("OPENSSL_sk_push", general, one)
        extension = _call("X509V3_EXT_i2d", _NID_SUBJECT_ALT_NAME, 0, general)
    with (
        _owned(extension, "X509_EXTENSION_free"),
        _owned(_call("OPENSSL_sk_new_null"), "OPENSSL_sk_free") as extensions,
    ):
        _call("OPENSSL_sk_push", extensions, extension)
        _call("X509_REQ_add_extensions", csr, extensions)


def _pem(write: str, *arguments: Any) -> bytes:
    # Memory that is wiped when it is freed.
    with _owned(_call("BIO_new", _call("BIO_s_secmem")), "BIO_free") as memory:
        _call(write, memory, *arguments)
        data = ctypes.c_char_p()
        size = _call("BIO_ctrl", memory, _BIO_CTRL_INFO, 0, ctypes.byref(data))
        return ctypes.string_at(data, size)
