"""Certificates as the certificate authority of old servers makes them, and keys in every form."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

NAME = "build-server"
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
KeyKind = Literal["rsa", "p256", "p384"]
Form = Literal["pkcs8", "traditional"]

_BOTH = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
_NOBODY = x509.Name([])


def new_key(kind: KeyKind) -> Key:
    if kind == "rsa":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1() if kind == "p256" else ec.SECP384R1())


def pem_key(key: Key, form: Form) -> bytes:
    """PKCS#8, or PKCS#1 and SEC1 as the kind of key has it."""
    forms = serialization.PrivateFormat
    return key.private_bytes(
        serialization.Encoding.PEM,
        forms.PKCS8 if form == "pkcs8" else forms.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


@dataclass(frozen=True)
class Authority:
    """An issuer: nobody by name, as its leaves; each of those may be a server and a client."""

    certificate: x509.Certificate
    key: Key

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, serial: int, key: Key) -> bytes:
        certificate = _builder(serial, key, self.certificate.subject, _NOBODY, ca=False)
        return certificate.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def root(subject: x509.Name = _NOBODY) -> Authority:
    key = new_key("rsa")
    return Authority(_builder(1, key, subject, subject, ca=True).sign(key, hashes.SHA256()), key)


def intermediate(parent: Authority, subject: x509.Name) -> Authority:
    key = new_key("rsa")
    builder = _builder(2, key, parent.certificate.subject, subject, ca=True)
    return Authority(builder.sign(parent.key, hashes.SHA256()), key)


def _builder(
    serial: int, key: Key, issuer: x509.Name, subject: x509.Name, *, ca: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(not ca, False, True, False, False, ca, ca, False, False)
    builder = (
        x509.CertificateBuilder()
        .serial_number(serial)
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key.public_key())
        .not_valid_before(now - timedelta(seconds=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(_BOTH), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=True)
    )
    if ca:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=2), critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, critical=False)
    return builder
