"""Keys that do not leave their store: what the author of a key store sees, and what makes keys of it.

A store answers two questions: what is the public key, and what is the signature of these bytes. Certificates,
requests and names are the framework's.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field
from enum import StrEnum
from typing import Any, NoReturn
from urllib.parse import unquote

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature

from firebuild_pki.display import counted
from firebuild_pki.errors import KeyStoreError, ProviderNotFound
from firebuild_pki.keys import PrivateKey, kind_of_key
from firebuild_pki.provider import API_VERSION, Clock, ProviderContext, utc_now
from firebuild_pki.settings import SecretRef
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import as_ca_error, one_text

_URI = re.compile(r"[a-z][a-z0-9+.-]+:", re.ASCII | re.IGNORECASE)
"""The beginning of a URI (RFC 3986 section 3.1); one letter would be a drive."""
_SECRET = re.compile(r"\bpin-value\s*=|://[^/?#@:]*:[^/?#]*@", re.ASCII | re.IGNORECASE)
"""Wherever it stands and however it is spelled: what is refused later is shown in the message."""
_MOST_BYTES = 64 * 1024
_REFER = (
    "take it out, and say where it is instead: {env: NAME} or {file: PATH}, for ca_key in ca_key_passphrase"
)


class SignatureAlgorithm(StrEnum):
    """What a stored key is asked for."""

    ECDSA_SHA256 = "ecdsa-sha256"
    ECDSA_SHA384 = "ecdsa-sha384"
    RSA_SHA256 = "rsa-sha256"
    """PKCS#1 v1.5 (RFC 8017 section 8.2)."""

    @property
    def hash_name(self) -> str:
        """Name of its hash, as `hashlib.new` takes it."""
        return self.value.partition("-")[2]


@dataclass(frozen=True, slots=True)
class KeyStoreContext:
    """What a key store may use of the world around it.

    Args:
        secret: fetches the PIN, passphrase or token that unlocks the key from where the settings say;
            None where they name none.
        environ: environment variables.
        clock: the current time.
        report: shows the user a sentence at once, for example that a button has to be pressed.
    """

    secret: Callable[[], str] | None = field(default=None, repr=False)
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    clock: Clock = utc_now
    report: Callable[[str], None] = field(default=lambda _: None, repr=False)


class StoredKey(ABC):
    """A key in its store, ready to sign. The framework calls a key from one thread, one call at a time.

    Several keys, of the same store and token as well, may be open in a process, each in a thread of its own,
    and are closed in any order. Any exception may be raised; a `CAError` with a hint serves people better.
    """

    @abstractmethod
    def public_key(self) -> bytes:
        """Return the public key as SubjectPublicKeyInfo (RFC 5280 section 4.1), DER or PEM."""

    @abstractmethod
    def sign(self, message: bytes, algorithm: SignatureAlgorithm) -> bytes:
        """Sign a message, which is not hashed yet.

        Returns:
            for RSA the signature as it is; for ECDSA the two numbers in DER (RFC 3279 section 2.2.3), which
            `ecdsa_der` makes of a pair that is just written one after the other.
        """

    def close(self) -> None:  # noqa: B027 - optional
        """Log out, end the session. May be called twice."""


@dataclass(frozen=True, slots=True)
class KeyStoreSpec:
    """What a plugin registers with ``register_key_stores``.

    Args:
        scheme: scheme of its URIs; equals the name of the entry point.
        open_key: opens the key that a URI names, and says what is wrong with URI, secret or token.
        summary: one line for listings.
        check_uri: says what is wrong with a URI, by an exception, without touching any store; None if nothing
            can be said before.
        api_version: the version of the contract that it was written for.
    """

    scheme: str
    open_key: Callable[[str, KeyStoreContext], StoredKey]
    summary: str
    api_version: int = API_VERSION
    check_uri: Callable[[str], object] | None = None


def ecdsa_der(pair: bytes) -> bytes:
    """Make DER of an ECDSA signature whose two numbers have the same length and stand one after the other.

    Raises:
        ValueError: the length is odd.
    """
    half, odd = divmod(len(pair), 2)
    if odd or not pair:
        raise ValueError(f"expected two numbers of the same length, found {counted(len(pair), 'byte')}")
    return encode_dss_signature(int.from_bytes(pair[:half]), int.from_bytes(pair[half:]))


def scheme_of(text: str) -> str | None:
    """Return the scheme of a key's URI in lower case; None for a path (one with a colon: ``./a:b``)."""
    found = _URI.match(text)
    return text[: found.end() - 1].lower() if found else None  # RFC 3986 section 3.1: any case will do


def has_secret(uri: str) -> bool:
    """Tell whether a URI holds a secret itself: a ``pin-value`` (RFC 7512), or a password before a host."""
    return any(_SECRET.search(text) for text in (uri, unquote(uri)))


def open_key(uri: str, secret: SecretRef | None, context: ProviderContext) -> OpenKey:
    """Open a key that stays in its store: a service for providers that sign by themselves.

    Args:
        uri: what names it, of a scheme for which a key store is installed.
        secret: where its PIN, passphrase or token is.
        context: of the provider.

    Returns:
        the key; whoever opened it closes it.

    Raises:
        KeyStoreError: there is no such store, or it cannot open the key.
    """
    uri, shown, spec = _store_of(uri, context)
    asked = KeyStoreContext(
        (lambda: secret.resolve(context.environ)) if secret is not None else None,
        context.environ,
        context.clock,
        context.report,
    )
    with _in_words(shown, "opening the key"):
        stored = spec.open_key(uri, asked)
        if not isinstance(stored, StoredKey):
            raise TypeError(f"open_key must return a StoredKey, found {type(stored).__name__}")
    try:
        return OpenKey(shown, stored)
    except BaseException:
        with suppress(Exception):
            stored.close()
        raise


def check_key_uri(uri: str, context: ProviderContext) -> None:
    """Say what is wrong with the URI of a key, without touching any store: for `CAProvider.validate`.

    Raises:
        KeyStoreError: there is no such store, or it finds fault with the URI.
    """
    uri, shown, spec = _store_of(uri, context)
    if spec.check_uri is not None:
        with _in_words(shown, "reading the URI"):
            spec.check_uri(uri)


def _store_of(uri: str, context: ProviderContext) -> tuple[str, str, KeyStoreSpec]:
    """Find the store that a URI means, and return the URI with its scheme in lower case, and for messages."""
    if has_secret(uri):
        raise KeyStoreError("the URI of a key holds a secret itself (not shown)", hint=_REFER)
    scheme = scheme_of(uri)
    if scheme is None:
        raise KeyStoreError(f"expected the URI of a key, such as pkcs11:token=ca, found {one_text(uri, 200)}")
    shown = one_text(uri, 200)
    try:
        if context.key_store is None:
            raise ProviderNotFound(f"there are no key stores here: {scheme}")
        spec = context.key_store(scheme)
    except ProviderNotFound as error:
        install = f"install the plugin of that key store; the path of a file is written ./{shown}"
        hint = error.hint if error.hint and error.hint.startswith("did you mean") else install
        raise KeyStoreError(f"{shown}: {error.message}", hint=hint) from None
    return f"{scheme}{uri[len(scheme) :]}", shown, spec


class OpenKey:
    """A key that a store opened, as one of cryptography's: what signs with a key of a file signs with it.

    Args:
        uri: what names it, for messages; holds no secret.
        stored: what the store gave.

    Raises:
        CAError: the store failed, or its key is of another kind than RSA or ECDSA.
    """

    def __init__(self, uri: str, stored: StoredKey) -> None:
        self.uri = uri
        self._stored = stored
        self._public = self._read_public()
        self.key: PrivateKey = self._as_private()

    def __repr__(self) -> str:
        return f"OpenKey({self.uri!r})"

    def public_key(self) -> Any:
        """The public key."""
        return self._public

    def close(self) -> None:
        """Let go of it; a store that fails here is not heard any more."""
        with _in_words(self.uri, "closing"):
            self._stored.close()

    def sign(self, message: bytes, algorithm: SignatureAlgorithm) -> bytes:
        """Have a message signed, and verify the signature: a store is trusted as little as a provider.

        Raises:
            KeyStoreError: the store failed, or its signature does not verify.
        """
        with _in_words(self.uri, "signing"):
            signature = self._stored.sign(message, algorithm)
        if not isinstance(signature, bytes) or len(signature) > _MOST_BYTES:
            raise self._wrong(f"expected a signature of bytes, found {type(signature).__name__}")
        try:
            self._verify(signature, message, algorithm)
        except InvalidSignature:
            raise self._wrong(f"its {algorithm} signature does not verify with its public key") from None
        return signature

    def _read_public(self) -> PublicKeyTypes:
        with _in_words(self.uri, "reading the public key"):
            data = self._stored.public_key()
        if not isinstance(data, bytes) or len(data) > _MOST_BYTES:
            raise self._wrong(f"expected its public key as bytes, found {type(data).__name__}")
        load = (
            serialization.load_pem_public_key
            if data.startswith(b"-----")
            else serialization.load_der_public_key
        )
        try:
            return load(data)
        except (ValueError, UnsupportedAlgorithm):
            hint = "a key store returns a SubjectPublicKeyInfo, in DER or PEM"
            raise self._wrong("its public key cannot be read", hint) from None

    def _as_private(self) -> PrivateKey:
        if isinstance(self._public, ec.EllipticCurvePublicKey):
            return _StoredECKey(self, self._public)
        if isinstance(self._public, rsa.RSAPublicKey):
            return _StoredRSAKey(self, self._public)
        found, hint = kind_of_key(self._public), "TLS libraries, or the stores, know no other kind"
        raise self._wrong(f"expected an RSA or EC key, found {found}", hint)

    def _verify(self, signature: bytes, message: bytes, algorithm: SignatureAlgorithm) -> None:
        hashed = _HASHES[algorithm.hash_name]()
        if isinstance(self._public, rsa.RSAPublicKey):
            self._public.verify(signature, message, padding.PKCS1v15(), hashed)
        elif isinstance(self._public, ec.EllipticCurvePublicKey):
            self._public.verify(signature, message, ec.ECDSA(hashed))

    def _wrong(self, message: str, hint: str | None = None) -> KeyStoreError:
        return KeyStoreError(f"{self.uri}: {message}", hint=hint)


@contextmanager
def _in_words(uri: str, doing: str) -> Iterator[None]:
    """Word what a store raises, as what a provider raises; its URI is named in place of a provider."""
    try:
        yield
    except Exception as error:
        ours = as_ca_error(error, "", doing)
        failure = KeyStoreError(f"{uri}: {ours.message}", hint=ours.hint, retryable=ours.retryable)
        raise failure from ours.__cause__


_HASHES: dict[str, Callable[[], hashes.SHA256 | hashes.SHA384]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
}


class _Stays:
    """Answers what cryptography's classes of keys want beside signatures: the key stays where it is."""

    def _stays(self, *_: object, **__: object) -> NoReturn:
        raise UnsupportedAlgorithm("the private key does not leave its store")

    private_bytes = private_numbers = exchange = decrypt = __copy__ = __deepcopy__ = _stays


# cryptography signs certificates and requests with any object of these classes, by calling its sign().
class _StoredECKey(_Stays, ec.EllipticCurvePrivateKey):
    def __init__(self, opened: OpenKey, public: ec.EllipticCurvePublicKey) -> None:
        self._opened, self._public = opened, public

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        hashed = signature_algorithm.algorithm
        if isinstance(hashed, Prehashed):
            raise UnsupportedAlgorithm("a key store signs messages, not digests")
        return self._opened.sign(bytes(data), SignatureAlgorithm(f"ecdsa-{hashed.name}"))


class _StoredRSAKey(_Stays, rsa.RSAPrivateKey):
    def __init__(self, opened: OpenKey, public: rsa.RSAPublicKey) -> None:
        self._opened, self._public = opened, public

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def sign(self, data: Any, padding: Any, algorithm: Any) -> bytes:
        if padding.name != "EMSA-PKCS1-v1_5" or isinstance(algorithm, Prehashed):
            raise UnsupportedAlgorithm("a key store signs messages, with PKCS#1 v1.5")
        return self._opened.sign(bytes(data), SignatureAlgorithm(f"rsa-{algorithm.name}"))
