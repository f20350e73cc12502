"""Which providers are installed, and what is wrong with those that cannot be used."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_pki.chain import error_message, extension_of, parse_certificates, serial_of
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.plugins import InstalledPlugin, PluginCatalog
from firebuild_pki.x509 import fingerprint

_EXTENDED = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "anyExtendedKeyUsage",
}
# RFC 5280 section 4.2.1.3; encipherOnly and decipherOnly only say more about keyAgreement
_USAGES = {
    "digital_signature": "digitalSignature",
    "content_commitment": "contentCommitment",
    "key_encipherment": "keyEncipherment",
    "data_encipherment": "dataEncipherment",
    "key_agreement": "keyAgreement",
    "key_cert_sign": "keyCertSign",
    "crl_sign": "cRLSign",
}


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate in words.

    Args:
        subject: distinguished name (RFC 4514); may be empty.
        issuer: distinguished name of who signed it.
        names: the subject alternative names.
        not_before: start of the validity, UTC.
        not_after: end of the validity, UTC.
        serial: serial number in hexadecimal.
        key: kind and size of the public key: ``EC secp256r1``, ``RSA 2048``.
        usages: key usage and extended key usage, by their names in RFC 5280.
        fingerprint_sha256: in hexadecimal.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    serial: str
    key: str
    usages: tuple[str, ...]
    fingerprint_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            **asdict(self),
            "names": list(self.names),
            "not_before": self.not_before.isoformat(),
            "not_after": self.not_after.isoformat(),
            "usages": list(self.usages),
        }


def certificate_facts(pem: bytes) -> tuple[CertificateFacts, ...]:
    """Read certificates.

    Args:
        pem: one or more certificates.

    Raises:
        MaterialError: they cannot be read.
    """
    certificates = parse_certificates(pem, "input")
    try:
        return tuple(map(_facts, certificates))
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        raise MaterialError(f"a certificate in the input cannot be read: {error_message(error)}") from error


def _facts(certificate: x509.Certificate) -> CertificateFacts:
    alternative = extension_of(certificate, x509.SubjectAlternativeName)
    usage = extension_of(certificate, x509.KeyUsage)
    extended = extension_of(certificate, x509.ExtendedKeyUsage)
    usages = [name for attribute, name in _USAGES.items() if usage and getattr(usage, attribute)]
    usages += [_EXTENDED.get(oid, oid.dotted_string) for oid in extended or ()]
    return CertificateFacts(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=tuple(str(name.value) for name in alternative or ()),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=f"{serial_of(certificate):x}",
        key=_key(certificate.public_key()),
        usages=tuple(usages),
        fingerprint_sha256=fingerprint(certificate),
    )


def _key(key: CertificatePublicKeyTypes) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    return type(key).__name__.removeprefix("_").removesuffix("PublicKey")


@dataclass(frozen=True, slots=True)
class ListedProvider:
    """An installed provider.

    Args:
        name: the name used in the configuration.
        distribution: the package that brings it.
        version: version of that package.
        location: file of the plugin, or the directory of its package if it cannot be imported.
        summary: what it says of itself; empty if it cannot be used.
        capabilities: what it can do.
        problem: why it cannot be used; None if it can.
        hint: what to do about that.
    """

    name: str
    distribution: str
    version: str
    location: str
    summary: str = ""
    capabilities: tuple[str, ...] = ()
    problem: str | None = None
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {**asdict(self), "capabilities": list(self.capabilities)}


def list_providers(catalog: PluginCatalog | None = None) -> tuple[ListedProvider, ...]:
    """Import every installed provider and list it; a broken one has its reason and harms no other.

    Args:
        catalog: the plugins, by default those installed.
    """
    plugins = PluginCatalog() if catalog is None else catalog
    return tuple(_listed(plugins, plugin) for plugin in plugins.providers())


def _listed(catalog: PluginCatalog, plugin: InstalledPlugin) -> ListedProvider:
    known = (plugin.name, plugin.distribution, plugin.version)
    try:
        spec = catalog.load_provider(plugin.name)
    except CAError as error:
        return ListedProvider(*known, _directory(plugin), problem=error.message, hint=error.hint)
    module = sys.modules.get(getattr(spec.factory, "__module__", ""))
    location = getattr(module, "__file__", None) or _directory(plugin)
    return ListedProvider(*known, location, spec.summary, tuple(sorted(spec.capabilities)))


def _directory(plugin: InstalledPlugin) -> str:
    try:
        return str(metadata.distribution(plugin.distribution).locate_file(""))
    except metadata.PackageNotFoundError:
        return ""
