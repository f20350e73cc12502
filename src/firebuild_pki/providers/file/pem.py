"""PEM blocks (RFC 7468), and the names of all that is found where one was expected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from firebuild_pki.errors import CAError
from firebuild_pki.providers.file.reading import Source

CERTIFICATE_LABELS = frozenset({"CERTIFICATE", "X509 CERTIFICATE"})
KEY_LABELS = frozenset({"PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"})

_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----")

_PKCS7 = bytes.fromhex("06092a864886f70d010702")
_PKCS12 = bytes.fromhex("02010330")


@dataclass(frozen=True, slots=True)
class Block:
    """One PEM block.

    Args:
        label: what it says it is.
        pem: the whole of it; may be a private key.
    """

    label: str
    pem: bytes

    def __repr__(self) -> str:
        return f"Block({self.label!r})"


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something that is not what was expected.

    Args:
        name: what it is, with its article.
        remedy: what to do; ``{file}`` stands for its path, quoted for a shell.
    """

    name: str
    remedy: str | None = None


def blocks_in(source: Source, data: bytes, wanted: frozenset[str], expected: str) -> list[Block]:
    """Find the PEM blocks of one kind; text and blocks of another kind around them are left out.

    Args:
        source: where the data is from.
        data: the content of the file.
        wanted: labels to look for.
        expected: what to call that in messages, with its article.

    Returns:
        At least one block.

    Raises:
        CAError: there is none; the message names what is there instead.
    """
    found = list(_blocks(data))
    if not found or len(found) < len(_BEGIN.findall(data)):
        foreign = _named(data)
    elif matching := [block for block in found if block.label in wanted]:
        return matching
    else:
        foreign = _LABELS.get(found[0].label, Foreign(f'a PEM block called "{found[0].label}"'))
    raise _instead(source, expected, foreign)


def _blocks(data: bytes) -> Iterator[Block]:
    """Yield the blocks up to the first one without its END line; one expression for both is quadratic."""
    position = 0
    while begin := _BEGIN.search(data, position):
        end = b"-----END %b-----" % begin[1]
        position = data.find(end, begin.end()) + len(end)
        if position < len(end):
            return
        yield Block(begin[1].decode(), data[begin.start() : position])


def _instead(source: Source, expected: str, found: Foreign) -> CAError:
    remedy = found.remedy and found.remedy.replace("{file}", source.quoted)
    return source.wrong(f"expected {expected} in PEM, found {found.name}", remedy)


_SWAPPED_KEY = "has this file been swapped with that of the certificate?"
_SWAPPED_CERTIFICATE = "has this file been swapped with that of the key?"
_REQUEST = Foreign(
    "a certificate signing request (CSR)", "name the certificate that the CA made from this request"
)

_LABELS = {
    **dict.fromkeys(KEY_LABELS, Foreign("a private key", _SWAPPED_KEY)),
    **dict.fromkeys(CERTIFICATE_LABELS, Foreign("a certificate", _SWAPPED_CERTIFICATE)),
    "TRUSTED CERTIFICATE": Foreign(
        "a certificate in OpenSSL's own TRUSTED form", "convert it: openssl x509 -in {file} -out file.pem"
    ),
    "CERTIFICATE REQUEST": _REQUEST,
    "NEW CERTIFICATE REQUEST": _REQUEST,
    "X509 CRL": Foreign("a certificate revocation list (CRL)"),
    "PUBLIC KEY": Foreign("a public key"),
    "EC PARAMETERS": Foreign("the parameters of an elliptic curve, and no key"),
    "DSA PRIVATE KEY": Foreign("a DSA key", "use an RSA or EC key"),
    "OPENSSH PRIVATE KEY": Foreign(
        "a key in OpenSSH's own form", "convert a copy: ssh-keygen -p -m PKCS8 -f {file}"
    ),
    "PKCS7": Foreign(
        "a PKCS#7 bundle", "convert it: openssl pkcs7 -in {file} -print_certs -out certificates.pem"
    ),
}


def _named(data: bytes) -> Foreign:
    if _BEGIN.search(data):
        return Foreign("a PEM block without its END line", "the file was cut off: copy it again")
    for start, foreign in _BEGINNINGS.items():
        if data.lstrip().startswith(start):
            return foreign
    if data.startswith(b"\x30"):
        return _der(data)
    if b"\0" in data:
        return Foreign("binary data")
    return Foreign("text without any BEGIN line")


_BEGINNINGS = {
    b"\xff\xfe": Foreign("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {file} > file.pem"),
    b"\xfe\xff": Foreign("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {file} > file.pem"),
    b"LS0tLS1CRUdJTi": Foreign(
        "a PEM file in base64, as in a Kubernetes secret", "decode it: base64 -d {file} > file.pem"
    ),
    b"MII": Foreign(
        "base64 without BEGIN and END lines", "decode it to DER first: base64 -d {file} > file.der"
    ),
    b"\xfe\xed\xfe\xed": Foreign(
        "a Java keystore",
        "convert it: keytool -importkeystore -srckeystore {file} -destkeystore file.p12 "
        "-deststoretype PKCS12, then openssl pkcs12 -in file.p12",
    ),
}


def _der(data: bytes) -> Foreign:
    if _PKCS12 in data[:12]:
        return Foreign(
            "a PKCS#12 file",
            "take it apart: openssl pkcs12 -in {file} -nokeys -out certificates.pem, "
            "and openssl pkcs12 -in {file} -nocerts -out private.key",
        )
    if _PKCS7 in data[:20]:
        return Foreign(
            "a PKCS#7 bundle in DER",
            "convert it: openssl pkcs7 -inform DER -in {file} -print_certs -out certificates.pem",
        )
    for load, foreign in _DER_LOADERS:
        try:
            load(data)
        except (ValueError, UnsupportedAlgorithm):
            continue
        except TypeError:  # an encrypted key, without its passphrase
            pass
        return foreign
    return Foreign("binary data")


_DER_LOADERS: tuple[tuple[Callable[[bytes], object], Foreign], ...] = (
    (
        x509.load_der_x509_certificate,
        Foreign("a DER certificate", "convert it: openssl x509 -inform DER -in {file} -out file.pem"),
    ),
    (x509.load_der_x509_csr, _REQUEST),
    (
        lambda data: serialization.load_der_private_key(data, None),
        Foreign("a DER private key", "convert it: openssl pkey -inform DER -in {file} -out file.pem"),
    ),
)
