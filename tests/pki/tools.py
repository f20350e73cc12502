"""What the tests of the CA framework share: a movable clock, a CA that breaks rules on request."""

from __future__ import annotations

import importlib
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firebuild_pki import Authority, CASettings, PluginCatalog, TLSMaterial, open_authority, validate
from firebuild_pki.documents import Document
from firebuild_pki.keys import PrivateKey, generate_key

NOW = datetime(2030, 5, 17, 12, 0, 0, tzinfo=UTC)
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
ANY_USAGE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING

LEAF_USAGE: dict[str, bool] = dict.fromkeys(
    (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    ),
    False,
) | {"digital_signature": True}


class Clock:
    """A clock that moves only when told to."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


def entry(name: str, value: str, group: str = "firebuild_pki.providers") -> EntryPoint:
    return EntryPoint(name, value, group)


def catalog_of(*names: str, observers: Iterable[str] = ()) -> PluginCatalog:
    """A catalog of plugins from `pki.signers` and `pki.characters`, and the embedded provider."""

    def place(name: str) -> str:
        attribute = name.replace("-", "_")
        module = "characters" if hasattr(importlib.import_module("pki.characters"), attribute) else "signers"
        return f"pki.{module}:{attribute}"

    return PluginCatalog(
        providers=[
            entry("embedded", "firebuild_pki.providers.embedded"),
            *(entry(name, place(name)) for name in names),
        ],
        observers=[entry(name, place(name)) for name in observers],
    )


def ca_settings(section: Mapping[str, Any], catalog: PluginCatalog | None = None) -> CASettings:
    document = Document({"ca": dict(section)})
    return validate(CASettings, document, at="ca", context={"catalog": catalog})


def opened(name: str, *, ca: Mapping[str, object] | None = None, **block: object) -> Authority:
    """Open an authority with one of the plugins of `catalog_of`."""
    settings = ca_settings({"provider": name, name: block, **(ca or {})}, catalog_of(name))
    return open_authority(settings, build_id="b", clock=Clock())


def certificates(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


def leaf_of(material: TLSMaterial) -> x509.Certificate:
    return certificates(material.certificate_chain_pem)[0]


@dataclass
class OperatorCA:
    """A CA of an operator, correct unless told otherwise."""

    name: str = "Operator Root"
    issuer: OperatorCA | None = None
    valid: tuple[datetime, datetime] = (NOW - timedelta(days=30), NOW + timedelta(days=30))
    extended_usage: list[x509.ObjectIdentifier] | None = None
    key_cert_sign: bool = True
    identifiers: bool = True
    ca: bool | None = True
    key: PrivateKey = field(default_factory=generate_key)
    constraints: x509.NameConstraints | None = None
    path_length: int | None = None
    more: Iterable[tuple[x509.ExtensionType, bool]] = ()
    authority_key: x509.AuthorityKeyIdentifier | None = None
    serial: int | None = None
    certificate: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        issuer = self.issuer or self
        name = _name(self.name)
        builder = _builder(
            name,
            issuer.certificate.subject if self.issuer else name,
            self.key.public_key(),
            self.valid,
            self.serial,
        )
        if self.ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(self.ca, self.path_length), critical=True)
        if self.constraints is not None:
            builder = builder.add_extension(self.constraints, critical=True)
        for extension, critical in self.more:
            builder = builder.add_extension(extension, critical=critical)
        usage = x509.KeyUsage(**{**LEAF_USAGE, "key_cert_sign": self.key_cert_sign})
        builder = builder.add_extension(usage, critical=True)
        if self.identifiers:
            builder = _identified(builder, self.key.public_key(), issuer.key, self.authority_key)
        if self.extended_usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.extended_usage), critical=False)
        self.certificate = builder.sign(issuer.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        return pem(self.certificate)

    def leaf(
        self,
        public_key: CertificatePublicKeyTypes,
        names: Iterable[str],
        *,
        usages: Iterable[x509.ObjectIdentifier] = (SERVER_AUTH,),
        valid: tuple[datetime, datetime] = (NOW - timedelta(minutes=5), NOW + timedelta(hours=1)),
        key_usage: Mapping[str, bool] | None = LEAF_USAGE,
        key_usage_critical: bool = True,
        other_names: Iterable[x509.GeneralName] = (),
        ca: bool = False,
        serial: int | None = None,
        identifiers: bool = True,
        authority_key: x509.AuthorityKeyIdentifier | None = None,
        subject: x509.Name | None = None,
        more: Iterable[tuple[x509.ExtensionType, bool]] = (),
    ) -> x509.Certificate:
        builder = _builder(
            _name("leaf") if subject is None else subject, self.certificate.subject, public_key, valid, serial
        )
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        alternative = [*map(x509.DNSName, names), *other_names]
        if alternative:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
        if usages := list(usages):
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if key_usage is not None:
            builder = builder.add_extension(x509.KeyUsage(**key_usage), critical=key_usage_critical)
        added = list(more)
        for extension, critical in added:
            builder = builder.add_extension(extension, critical=critical)
        if identifiers and not added:
            builder = _identified(builder, public_key, self.key, authority_key)
        return builder.sign(self.key, hashes.SHA256())


def pem(*chain: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, server_name: str) -> ssl.SSLObject:
    """Run a TLS handshake in memory, with one byte each way; return the client's end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(to_client, to_server, server_hostname=server_name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    steps: list[Callable[[], object]] = [one.do_handshake, other.do_handshake]
    while steps:
        step = steps.pop(0)
        try:
            step()
        except ssl.SSLWantReadError:
            steps.append(step)
    other.write(b"!")
    assert one.read(1) == b"!"
    one.write(b"?")
    assert other.read(1) == b"?"
    return one


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: CertificatePublicKeyTypes,
    valid: tuple[datetime, datetime],
    serial: int | None = None,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
    )


def _identified(
    builder: x509.CertificateBuilder,
    public_key: CertificatePublicKeyTypes,
    issuer: PrivateKey,
    authority_key: x509.AuthorityKeyIdentifier | None = None,
) -> x509.CertificateBuilder:
    authority = authority_key or x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    return builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False
    ).add_extension(authority, critical=False)
