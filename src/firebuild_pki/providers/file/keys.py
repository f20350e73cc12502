"""Private keys in files: plain or encrypted, PKCS#8 (RFC 5958), PKCS#1 (RFC 8017), SEC1 (RFC 5915)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from firebuild_pki.chain import CURVES, MIN_RSA_BITS
from firebuild_pki.errors import SecretError
from firebuild_pki.keys import PrivateKey
from firebuild_pki.providers.file.pem import KEY_LABELS, Block, blocks_in
from firebuild_pki.providers.file.reading import Source, read
from firebuild_pki.settings import SecretRef

LEAF_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}
"""Those that gRPC accepts in the certificates of server and guest."""


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A private key out of a file.

    Args:
        source: the file.
        key: the key itself.
        encrypted: whether a passphrase was needed.
    """

    source: Source
    key: PrivateKey
    encrypted: bool

    def __repr__(self) -> str:
        return f"LoadedKey({str(self.source)!r}, {kind_of_key(self.key.public_key())!r})"


def load_key(
    source: Source,
    passphrase: SecretRef | None,
    environ: Mapping[str, str],
    *,
    curves: Mapping[str, str] = CURVES,
) -> LoadedKey:
    """Read the private key in a file.

    Args:
        source: the file; certificates beside the key are left out.
        passphrase: where the passphrase is, if the key needs one.
        environ: where the reference looks.
        curves: the elliptic curves that will do, and their names.

    Raises:
        CAError: there is not exactly one key, it is of a kind that cannot be used, the passphrase
            is missing or wrong, or others can read the file.
    """
    content = read(source)
    found = blocks_in(source, content.data, KEY_LABELS, "a private key")
    content.must_be_private()
    if len(found) > 1:
        raise source.wrong(f"expected one private key, found {len(found)}", "split the file")
    block = found[0]
    encrypted = block.label == "ENCRYPTED PRIVATE KEY" or b"4,ENCRYPTED" in block.pem
    secret = _passphrase(source, passphrase, environ) if encrypted else None
    return LoadedKey(source, _usable(source, _decoded(source, block, secret), curves), encrypted)


def kind_of_key(key: PublicKeyTypes) -> str:
    """Name the kind of a key as people write it: ``RSA 2048``, ``EC P-256``."""
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {CURVES.get(key.curve.name, key.curve.name)}"
    return type(key).__name__.strip("_").removesuffix("PublicKey")


def _passphrase(source: Source, reference: SecretRef | None, environ: Mapping[str, str]) -> bytes:
    setting = f"{source.setting}_passphrase"
    if reference is None:
        hint = f"set {setting} to {{env: NAME}} or {{file: PATH}}"
        raise source.wrong("the key is encrypted, and there is no passphrase for it", hint)
    try:
        return reference.resolve(environ).encode()
    except SecretError as error:
        raise SecretError(f"{setting}: {error.message}", hint=error.hint) from error


def _decoded(source: Source, block: Block, passphrase: bytes | None) -> PrivateKeyTypes:
    # the reasons are not passed on: they may quote what is in the file
    try:
        return serialization.load_pem_private_key(block.pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        unknown = "unknown" in str(error).lower() or isinstance(error, UnsupportedAlgorithm)
    if unknown:
        anew = f"encrypt it anew: openssl pkcs8 -topk8 -v2 aes-256-cbc -in {source.quoted} -out new.key"
        raise source.wrong("the key is of an unknown kind, or encrypted in an unknown way", anew)
    if passphrase is not None:
        hint = f"try it: openssl pkey -in {source.quoted} -noout"
        raise source.wrong(f"{source.setting}_passphrase does not decrypt the key", hint)
    raise source.wrong("the private key in it is damaged", "copy it again from where it was made")


def _usable(source: Source, key: PrivateKeyTypes, curves: Mapping[str, str]) -> PrivateKey:
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return key
    wanted = f"an RSA key of {MIN_RSA_BITS} bits or more, or an EC key on {' or '.join(curves.values())}"
    found = kind_of_key(key.public_key())
    hint = "gRPC, or the check of the certificates before it, refuses every other kind"
    raise source.wrong(f"expected {wanted}, found {found}", hint)
