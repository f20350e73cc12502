"""Private keys: which kinds there are, how they are made, read and written."""

from __future__ import annotations

import re
import threading
import warnings
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, mldsa, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

from firebuild_pki.errors import CAError

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""The curves that path validation accepts, and what people call them."""

LEAF_CURVES = {name: CURVES[name] for name in ("secp256r1", "secp384r1")}
"""Those that gRPC accepts in the certificates of server and guest."""

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
"""What server and guest may have."""

MLDSAPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
MLDSAPublicKey = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey

CAPrivateKey = PrivateKey | MLDSAPrivateKey
"""What a CA may have."""


class KeyType(StrEnum):
    """The kinds of key that gRPC, Vault and the standard library's ssl all accept.

    Ed25519, P-521 and ML-DSA are not here: a gRPC handshake with such a leaf fails.
    """

    P256 = "p256"
    P384 = "p384"
    RSA2048 = "rsa2048"
    RSA3072 = "rsa3072"
    RSA4096 = "rsa4096"


class CAKeyType(StrEnum):
    """The kinds of key of a CA: those of leaves, and ML-DSA (FIPS 204), which quantum computers do not break.

    BoringSSL, which is gRPC's, and OpenSSL from 3.5 on verify ML-DSA signatures in certificates (RFC 9881).
    """

    P256 = "p256"
    P384 = "p384"
    RSA2048 = "rsa2048"
    RSA3072 = "rsa3072"
    RSA4096 = "rsa4096"
    ML_DSA_44 = "ml-dsa-44"
    ML_DSA_65 = "ml-dsa-65"
    ML_DSA_87 = "ml-dsa-87"


_MAKERS: dict[KeyType, Callable[[], PrivateKey]] = {
    KeyType.P256: lambda: ec.generate_private_key(ec.SECP256R1()),
    KeyType.P384: lambda: ec.generate_private_key(ec.SECP384R1()),
    KeyType.RSA2048: lambda: rsa.generate_private_key(65537, 2048),
    KeyType.RSA3072: lambda: rsa.generate_private_key(65537, 3072),
    KeyType.RSA4096: lambda: rsa.generate_private_key(65537, 4096),
}

_ML_DSA: dict[CAKeyType, type[MLDSAPrivateKey]] = {
    CAKeyType.ML_DSA_44: mldsa.MLDSA44PrivateKey,
    CAKeyType.ML_DSA_65: mldsa.MLDSA65PrivateKey,
    CAKeyType.ML_DSA_87: mldsa.MLDSA87PrivateKey,
}

ML_DSA = frozenset(_ML_DSA)
"""The kinds whose signatures quantum computers do not break."""


_SLOW = frozenset({KeyType.RSA2048, KeyType.RSA3072, KeyType.RSA4096})


def generate_key(key_type: KeyType = KeyType.P256) -> PrivateKey:
    """Make a new private key. RSA keys of 4096 bits take about a second."""
    return _MAKERS[key_type]()


def kind_of_key(key: PublicKeyTypes) -> str:
    """Name the kind of a key as people write it: ``RSA 2048``, ``EC P-256``, ``ML-DSA-65``."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {CURVES.get(key.curve.name, key.curve.name)}"
    kind = type(key).__name__.strip("_").removesuffix("PublicKey")
    return re.sub(r"^MLDSA(\d+)$", r"ML-DSA-\1", kind)


def is_unknown(error: BaseException) -> bool:
    """Tell whether reading a private key failed as its kind, or how it is encrypted, is not known here."""
    return isinstance(error, UnsupportedAlgorithm) or "unknown" in str(error).lower()


# id-ml-dsa-44 and the two after it, in the PKCS#8 of RFC 9881 section 6: the form "both", seed first
_ML_DSA_OID = b"\x06\x09\x60\x86\x48\x01\x65\x03\x04\x03"
_BOTH = re.compile(
    _ML_DSA_OID + b"([\x11-\x13])\x04\x82..\x30\x82..\x04\x20(.{32})\x04\x82",
    re.DOTALL,
)


def ml_dsa_key(pem: bytes, passphrase: bytes | None) -> MLDSAPrivateKey | None:
    """Read an ML-DSA key as OpenSSL writes it, with its seed and its expanded form.

    cryptography reads the seed alone. OpenSSL's decoder takes off the encryption.

    Args:
        pem: one PKCS#8 block.
        passphrase: if it is encrypted.

    Returns:
        None if it is not such a key.

    Raises:
        ValueError: it has no seed, which cryptography needs.
    """
    from OpenSSL import crypto

    try:
        key = crypto.load_privatekey(crypto.FILETYPE_PEM, pem, passphrase or b"")
        with warnings.catch_warnings():  # deprecated in favour of cryptography, which cannot
            warnings.simplefilter("ignore", DeprecationWarning)
            der = crypto.dump_privatekey(crypto.FILETYPE_ASN1, key)
    except (crypto.Error, ValueError, TypeError):
        return None
    found = _BOTH.search(der)
    if found is None:
        if _ML_DSA_OID in der[:64]:
            raise ValueError("the ML-DSA key in it has no seed, only what was made of one")
        return None
    kind = list(_ML_DSA.values())[found[1][0] - 0x11]
    return kind.from_seed_bytes(found[2])


class Keys:
    """Private keys of one kind, begun before they are asked for where that takes long.

    An RSA key takes 40 ms and more. It is made without the interpreter's lock, so two processors make two.
    """

    def __init__(self, key_type: KeyType) -> None:
        self._key_type = key_type
        self._begun: deque[_BegunKey] = deque()

    def begin(self, count: int) -> None:
        """Begin to make keys, each in a thread of its own; nothing for kinds that take no time."""
        if self._key_type in _SLOW:
            self._begun.extend(_BegunKey(self._key_type) for _ in range(count))

    def take(self) -> PrivateKey:
        """Return a key that nobody else gets, one that was begun if there is one left."""
        return self._begun.popleft().get() if self._begun else generate_key(self._key_type)

    def drop(self) -> None:
        """Let go of the keys that nobody took."""
        self._begun.clear()


class _BegunKey:
    def __init__(self, key_type: KeyType) -> None:
        self._key_type = key_type
        self._made: PrivateKey | None = None
        # A daemon, as nobody has to wait for a key that is not needed any more.
        self._thread = threading.Thread(target=self._make, name="key", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        self._made = generate_key(self._key_type)

    def get(self) -> PrivateKey:
        self._thread.join()
        return self._made or generate_key(self._key_type)


def make_ca_keys(key_type: CAKeyType, count: int) -> list[CAPrivateKey]:
    """Make private keys for a CA, side by side where that takes long.

    Raises:
        CAError: the OpenSSL that cryptography was built with does not know ML-DSA.
    """
    if key_type not in _ML_DSA:
        keys = Keys(KeyType(key_type.value))
        keys.begin(count if count > 1 else 0)
        return [keys.take() for _ in range(count)]
    try:
        return [_ML_DSA[key_type].generate() for _ in range(count)]
    except UnsupportedAlgorithm:
        hint = "install cryptography from its wheels, or choose another key_type"
        raise CAError(f"cryptography cannot make a key of the kind {key_type} here", hint=hint) from None


def is_usable(key: PrivateKey) -> bool:
    """Tell whether a gRPC handshake works with a leaf that has this key: P-256, P-384 or RSA."""
    return not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name in LEAF_CURVES


def private_key_pem(key: CAPrivateKey) -> bytes:
    """Write a key as unencrypted PKCS#8 PEM (RFC 5958)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
