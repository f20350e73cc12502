"""One-time tokens: JSON web tokens (RFC 7519) that the key of a provisioner signs.

Names of claims and headers are those that step-ca reads: https://smallstep.com/docs/step-ca/provisioners/
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from firebuild_pki import CAError, SecretRef
from firebuild_pki.homes import read_small

from firebuild_pki_step_ca.settings import JWKAuth, X5CAuth

if TYPE_CHECKING:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    AnyKey = ECKey | OKPKey | RSAKey

LIFETIME: Final = 300
"""Seconds that a token is good for, as those of `step`; it is used at once."""
_BACKDATE: Final = 30
_ALGORITHMS: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA"}
# What `step` encrypts keys with, today and before.
_ENCRYPTIONS: Final = {("PBES2-HS256+A128KW", "A256GCM"), ("PBES2-HS256+A128KW", "A128GCM")}
_MOST_PEM: Final = 1 << 20
# step 0.77 writes 600,000; more would be a way to keep this process busy.
_MOST_ROUNDS: Final = 5_000_000
_PUBLIC: Final = ("kty", "crv", "x", "y", "n", "e")


@dataclass(frozen=True, slots=True)
class Signer:
    """What signs the tokens of one provisioner.

    Args:
        provisioner: its name.
        key: the private key.
        algorithm: the name of the signature (RFC 7518).
        header: what tells the server which key to check with: `kid`, or `x5c`.
        fragment: follows the URL in the audience, where the server finds the provisioner by that.
    """

    provisioner: str
    key: AnyKey = field(repr=False)
    algorithm: str
    header: Mapping[str, Any] = field(repr=False)
    fragment: str = ""

    def token(self, audience: str, subject: str, now: float, **claims: object) -> str:
        """Make a token that is good once.

        Args:
            audience: URL of the endpoint it is for.
            subject: the first name, or a serial number.
            now: seconds since 1970, for its validity.
            claims: what else it says.
        """
        moment = int(now)
        said = {
            "iss": self.provisioner,
            "aud": audience + self.fragment,
            "sub": subject,
            "iat": moment,
            "nbf": moment - _BACKDATE,
            "exp": moment + LIFETIME,
            "jti": secrets.token_hex(32),
            **claims,
        }
        return self._signed({"alg": self.algorithm, "typ": "JWT", **self.header}, said)

    def _signed(self, header: Mapping[str, Any], said: Mapping[str, Any]) -> str:
        private = self.key.private_key
        if isinstance(private, ed25519.Ed25519PrivateKey):
            # step-ca knows the name of RFC 8037 only; RFC 9864 deprecates it, on which joserfc remarks
            text = ".".join(_base64(json.dumps(part).encode()) for part in (header, said))
            return f"{text}.{_base64(private.sign(text.encode()))}"
        from joserfc import jwt

        return jwt.encode(dict(header), dict(said), self.key, algorithms=[self.algorithm])


def sign_claims(csr_pem: bytes, names: Sequence[str], root_fingerprint: str) -> dict[str, object]:
    """Return what a token says of one request: its names, the CA that is meant, and the request itself."""
    csr = x509.load_pem_x509_csr(csr_pem)
    digest = hashlib.sha256(csr.public_bytes(Encoding.DER)).digest()
    return {"sans": list(names), "sha": root_fingerprint, "cnf": {"x5rt#S256": _base64(digest)}}


def jwk_signer(auth: JWKAuth, known: Sequence[Mapping[str, Any]], environ: Mapping[str, str]) -> Signer:
    """Make what signs for a JWK provisioner.

    Args:
        auth: the settings.
        known: the provisioners of this name and type that the server has; several while a key is replaced.
        environ: where references to secrets look.

    Raises:
        CAError: the key cannot be read, or is not that of the provisioner.
    """
    password = None if auth.password is None else auth.password.resolve(environ)
    if auth.key is not None:
        texts = [("auth.key", auth.key.resolve(environ))]
    else:
        texts = [
            ("the key that step-ca has", str(one["encryptedKey"])) for one in known if one.get("encryptedKey")
        ]
        if not texts:
            raise CAError(
                f'step-ca does not have the private key of the provisioner "{auth.provisioner}"',
                hint="set auth.key to where it is",
            )
    for where, text in texts:
        key = _read_key(where, text.strip(), password)
        public = key.as_dict(private=False)
        for one in known:
            theirs = one.get("key")
            if isinstance(theirs, Mapping) and _same(public, theirs):
                header = {"kid": str(theirs.get("kid", ""))}
                return Signer(auth.provisioner, key, _algorithm(where, public), header)
    raise CAError(
        f'auth.key is not the key of the provisioner "{auth.provisioner}"',
        hint="was it replaced at the server? Leave auth.key out to use the one that the server has",
    )


def x5c_signer(auth: X5CAuth, environ: Mapping[str, str]) -> Signer:
    """Make what signs for an X5C provisioner.

    Raises:
        CAError: certificate or key cannot be read, or do not belong together.
    """
    chain = _certificates(auth.cert_file)
    key = _read_key(
        "auth.key_file", _text(auth.key_file, "auth.key_file"), _secret(auth.key_passphrase, environ)
    )
    public = key.as_dict(private=False)
    if not _same(public, _as_jwk(chain[0])):
        raise CAError(
            f"auth.key_file {auth.key_file} does not fit the first certificate in auth.cert_file",
            hint=f"these two have to print the same: openssl pkey -in {auth.key_file} -pubout; "
            f"openssl x509 -in {auth.cert_file} -noout -pubkey",
        )
    encoded = [base64.b64encode(one.public_bytes(Encoding.DER)).decode() for one in chain]
    algorithm = _algorithm("auth.key_file", public)
    return Signer(auth.provisioner, key, algorithm, {"x5c": encoded}, f"#x5c/{auth.provisioner}")


def _secret(reference: SecretRef | None, environ: Mapping[str, str]) -> str | None:
    return None if reference is None else reference.resolve(environ)


def _text(path: Path, setting: str) -> str:
    try:
        data = read_small(os.path.expanduser(path), _MOST_PEM)
        text = data.decode("ascii", "ignore")  # comments may be in UTF-8
    except OSError as error:
        raise CAError(f"{setting}: cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise CAError(f"{setting}: expected PEM in {path}")
    return text


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_text(path, "auth.cert_file").encode())
    except ValueError:
        raise CAError(f"auth.cert_file: expected certificates in PEM in {path}") from None


def _as_jwk(certificate: x509.Certificate) -> Mapping[str, Any]:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    key = certificate.public_key()
    if isinstance(key, ed25519.Ed25519PublicKey):
        return OKPKey.import_key(key).as_dict(private=False)
    if isinstance(key, ec.EllipticCurvePublicKey):
        return ECKey.import_key(key).as_dict(private=False)
    if isinstance(key, rsa.RSAPublicKey):
        return RSAKey.import_key(key).as_dict(private=False)
    return {}


def _read_key(where: str, text: str, password: str | None) -> AnyKey:
    """Read a private key: PEM, a JWK, or a JWK that is encrypted (RFC 7516), compact or as JSON."""
    from joserfc.errors import JoseError
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    unreadable = (ValueError, KeyError, InvalidTag, InvalidUnwrap, UnsupportedAlgorithm, JoseError)
    try:
        if "-----BEGIN" in text:
            found = load_pem_private_key(text.encode(), None if password is None else password.encode())
            if isinstance(found, ec.EllipticCurvePrivateKey):
                return ECKey.import_key(found)
            if isinstance(found, rsa.RSAPrivateKey):
                return RSAKey.import_key(found)
            if isinstance(found, ed25519.Ed25519PrivateKey):
                return OKPKey.import_key(found)
            raise CAError(f"{where}: expected an EC, RSA or Ed25519 key")
        return _read_jwk(where, text, password)
    except TypeError:  # what cryptography says of a passphrase that is missing, or not needed
        if password is not None:
            raise CAError(
                f"{where}: the key is not encrypted, and has a passphrase set", hint="leave it out"
            ) from None
        raise CAError(
            f"{where}: the key needs its passphrase", hint="give it by {env: NAME} or {file: PATH}"
        ) from None
    except unreadable:  # which could quote the key
        hint = "is the password right?" if password is not None else "expected a JWK or PEM"
        raise CAError(f"{where}: the private key cannot be read", hint=hint) from None


def _read_jwk(where: str, text: str, password: str | None) -> AnyKey:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    encrypted = not text.startswith("{")
    document: Any = {} if encrypted else json.loads(text)
    if "ciphertext" in document:  # the flattened form, which `step crypto` writes
        parts = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
        text, encrypted = ".".join(str(document.get(part, "")) for part in parts), True
    if encrypted:
        if password is None:
            raise CAError(f"{where}: the key is encrypted", hint="set auth.password to where its password is")
        document = json.loads(_decrypted(text, password))
    kinds: dict[str, Any] = {"EC": ECKey, "OKP": OKPKey, "RSA": RSAKey}
    key: AnyKey = kinds[document["kty"]].import_key(document)
    if not key.is_private:
        raise CAError(f"{where}: expected a private key, found a public one")
    return key


def _decrypted(text: str, password: str) -> bytes:
    """Open a key that a password encrypts: PBES2-HS256+A128KW (RFC 7518, section 4.8) and AES-GCM.

    joserfc refuses the number of rounds that `step` writes, and remarks on short passwords on stderr.
    """
    protected, wrapped, nonce, ciphertext, tag = text.split(".")
    header = json.loads(_unbase64(protected))
    rounds = header["p2c"]
    if (header["alg"], header["enc"]) not in _ENCRYPTIONS or not 1000 <= rounds <= _MOST_ROUNDS:
        raise ValueError("not as step encrypts keys")
    salt = header["alg"].encode() + b"\0" + _unbase64(header["p2s"])
    derived = PBKDF2HMAC(hashes.SHA256(), 16, salt, rounds).derive(password.encode())
    content_key = aes_key_unwrap(derived, _unbase64(wrapped))
    return AESGCM(content_key).decrypt(
        _unbase64(nonce), _unbase64(ciphertext) + _unbase64(tag), protected.encode()
    )


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _algorithm(where: str, public: Mapping[str, Any]) -> str:
    found = "RS256" if public.get("kty") == "RSA" else _ALGORITHMS.get(str(public.get("crv")))
    if found is None:
        raise CAError(f"{where}: keys on the curve {public.get('crv')} are not used here")
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return [one.get(part) for part in _PUBLIC] == [other.get(part) for part in _PUBLIC]
