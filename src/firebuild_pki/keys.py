"""Private keys: which kinds there are, how they are made and written."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class KeyType(StrEnum):
    """The kinds of key that gRPC, Vault and the standard library's ssl all accept.

    Ed25519 and P-521 are not here: a gRPC handshake with such a leaf fails.
    """

    P256 = "p256"
    P384 = "p384"
    RSA2048 = "rsa2048"
    RSA3072 = "rsa3072"
    RSA4096 = "rsa4096"


_MAKERS: dict[KeyType, Callable[[], PrivateKey]] = {
    KeyType.P256: lambda: ec.generate_private_key(ec.SECP256R1()),
    KeyType.P384: lambda: ec.generate_private_key(ec.SECP384R1()),
    KeyType.RSA2048: lambda: rsa.generate_private_key(65537, 2048),
    KeyType.RSA3072: lambda: rsa.generate_private_key(65537, 3072),
    KeyType.RSA4096: lambda: rsa.generate_private_key(65537, 4096),
}


_SLOW = frozenset({KeyType.RSA2048, KeyType.RSA3072, KeyType.RSA4096})


def generate_key(key_type: KeyType = KeyType.P256) -> PrivateKey:
    """Make a new private key. RSA keys of 4096 bits take about a second."""
    return _MAKERS[key_type]()


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


def is_usable(key: PrivateKey) -> bool:
    """Tell whether a gRPC handshake works with a leaf that has this key: P-256, P-384 or RSA."""
    return not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name in ("secp256r1", "secp384r1")


def private_key_pem(key: PrivateKey) -> bytes:
    """Write a key as unencrypted PKCS#8 PEM (RFC 5958)."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
