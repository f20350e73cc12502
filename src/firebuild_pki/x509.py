"""Certificate profiles: every field of every certificate that the framework shapes itself.

The rules are those of RFC 5280, tightened to what gRPC, OpenSSL's strict mode and Python's
``VERIFY_X509_STRICT`` accept. A provider that signs in this process uses these functions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firebuild_pki.keys import CAPrivateKey, MLDSAPrivateKey, PrivateKey
from firebuild_pki.provider import Profile
from firebuild_pki.values import dataclass

MAX_COMMON_NAME = 64
"""Upper bound of a common name, RFC 5280 appendix A (ub-common-name)."""

USAGE = {
    Profile.SERVER: ExtendedKeyUsageOID.SERVER_AUTH,
    Profile.GUEST: ExtendedKeyUsageOID.CLIENT_AUTH,
}
"""The extended key usage of each end of a connection."""


def usages_of(profile: Profile) -> tuple[x509.ObjectIdentifier, ...]:
    """The extended key usages of a kind of leaf: one, or for a peer both."""
    return tuple(USAGE.values()) if profile is Profile.PEER else (USAGE[profile],)


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA certificate and its private key."""

    certificate: x509.Certificate
    key: CAPrivateKey

    def __repr__(self) -> str:
        return f"Issuer({self.certificate.subject.rfc4514_string()!r})"


_EARLIEST = datetime(1950, 1, 1, tzinfo=UTC)
"""Where UTCTime begins (RFC 5280 section 4.1.2.5.1)."""


@dataclass(frozen=True, slots=True)
class Validity:
    """A period in UTC. X.509 knows whole seconds only: fractions are cut off."""

    not_before: datetime
    not_after: datetime

    @classmethod
    def starting(cls, now: datetime, lifetime: timedelta, *, backdate: timedelta) -> Validity:
        """Begin ``backdate`` before now, for peers whose clock is slow; end ``lifetime`` after."""
        start, end = max(now - backdate, _EARLIEST), now + lifetime
        return cls(start.replace(microsecond=0), end.replace(microsecond=0))

    def within(self, issuer: x509.Certificate) -> Validity:
        """Cut to the validity of the issuer: a leaf never outlives its CA."""
        return Validity(
            max(self.not_before, issuer.not_valid_before_utc),
            min(self.not_after, issuer.not_valid_after_utc),
        )


def only_below(domain: str, names: Iterable[str] = ()) -> x509.NameConstraints:
    """Permit the names of one domain and of what is below it, and few others (RFC 5280 section 4.2.1.10).

    DNS names, URIs and e-mail addresses are held to the domain by permitting it: OpenSSL and BoringSSL know
    no way to exclude all of a kind, but for IP addresses. Directory names are left alone: Go refuses a
    critical extension that has one. With a DNS constraint, OpenSSL and BoringSSL hold the common name to it,
    too, where a certificate has no alternative names.

    Args:
        domain: in lower case, without a leading dot.
        names: what is permitted besides: DNS names, with all below them, and URIs, each with all others of
            its host, which is the trust domain of a SPIFFE id.

    Raises:
        ValueError: a URI has no host.
    """
    hosts: dict[str, None] = {}
    others: dict[str, None] = {}
    for name in names:
        if "://" not in name:
            others[name] = None
        elif host := urlsplit(name).hostname:
            hosts[host] = None
        else:
            raise ValueError(f"the URI {name} has no host")
    return x509.NameConstraints(
        [
            *(x509.DNSName(name) for name in (domain, *others)),
            *(x509.UniformResourceIdentifier(host) for host in hosts or (domain,)),
            x509.RFC822Name(domain),
        ],
        _every_address(),
    )


@cache
def _every_address() -> tuple[x509.IPAddress, ...]:
    return tuple(x509.IPAddress(ipaddress.ip_network(every)) for every in ("0.0.0.0/0", "::/0"))


def make_root(
    key: CAPrivateKey,
    validity: Validity,
    *,
    with_intermediate: bool,
    constraints: x509.NameConstraints | None = None,
) -> Issuer:
    """Make a self-signed root.

    Args:
        key: its key.
        validity: its period.
        with_intermediate: whether its path length leaves room for one intermediate, or for none.
        constraints: what may be named below it; by default everything.
    """
    name = _ca_name("root", key.public_key())
    builder = _builder(name, name, key.public_key(), validity)
    builder = _as_ca(builder, 1 if with_intermediate else 0, constraints)
    return Issuer(builder.sign(key, _hash(key)), key)


def make_intermediate(key: CAPrivateKey, root: Issuer, validity: Validity) -> Issuer:
    """Make the CA below the root that signs leaves; it repeats the root's name constraints.

    So they also hold for a peer that trusts the intermediate itself, or that heeds none of an anchor
    (RFC 5280 section 6.1.1 leaves that open).
    """
    name = _ca_name("intermediate", key.public_key())
    limited = validity.within(root.certificate)
    builder = _builder(name, root.certificate.subject, key.public_key(), limited)
    builder = _as_ca(builder, 0, _constraints_of(root.certificate))
    builder = builder.add_extension(_authority_key_identifier(root), critical=False)
    return Issuer(builder.sign(root.key, _hash(root.key)), key)


def make_leaf(
    public_key: CertificatePublicKeyTypes,
    issuer: Issuer,
    validity: Validity,
    *,
    profile: Profile,
    dns_names: Sequence[str],
    uri_names: Sequence[str] = (),
    nameless: bool = False,
) -> x509.Certificate:
    """Make the certificate of one end of a connection.

    Args:
        public_key: the key to certify, usually that of a CSR.
        issuer: who signs.
        validity: wanted period; cut to that of the issuer.
        profile: decides the extended key usage.
        dns_names: the identity; the first one is the common name where it is short enough.
        uri_names: URIs besides or in place of DNS names, such as a SPIFFE ID.
        nameless: leave the subject empty, where a CA above has an opinion of subjects.
    """
    subject = leaf_subject(() if nameless else dns_names)
    limited = validity.within(issuer.certificate)
    builder = _builder(subject, issuer.certificate.subject, public_key, limited)
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages_of(profile)), critical=False)
        .add_extension(alternative_name(dns_names, uri_names), critical=not subject)
        .add_extension(_authority_key_identifier(issuer), critical=False)
    )
    return builder.sign(issuer.key, _hash(issuer.key))


def make_csr(key: PrivateKey, dns_names: Sequence[str], uri_names: Sequence[str] = ()) -> bytes:
    """Write a PKCS#10 request (RFC 2986) for the names, as PEM."""
    subject = leaf_subject(dns_names)
    builder = x509.CertificateSigningRequestBuilder(subject).add_extension(
        alternative_name(dns_names, uri_names), critical=not subject
    )
    return builder.sign(key, _hash(key)).public_bytes(serialization.Encoding.PEM)


def leaf_subject(dns_names: Sequence[str]) -> x509.Name:
    """Take the first name as common name; a longer one, and no DNS name at all, leave the subject empty."""
    if not dns_names or len(dns_names[0]) > MAX_COMMON_NAME:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, dns_names[0])])


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate's DER form, in hexadecimal."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def to_pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """Write certificates one after the other."""
    return b"".join(map(_pem, certificates))


@lru_cache(maxsize=16)  # a CA's is written with each of its leaves, a leaf's by provider and framework
def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _ca_name(role: str, public_key: CertificatePublicKeyTypes) -> x509.Name:
    # a part of the key's digest keeps the names of different authorities apart
    digest = x509.SubjectKeyIdentifier.from_public_key(public_key).digest.hex()
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"firebuild {role} {digest[:16]}")])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: CertificatePublicKeyTypes,
    validity: Validity,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity.not_before)
        .not_valid_after(validity.not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _as_ca(
    builder: x509.CertificateBuilder, path_length: int, constraints: x509.NameConstraints | None
) -> x509.CertificateBuilder:
    builder = builder.add_extension(
        x509.BasicConstraints(ca=True, path_length=path_length), critical=True
    ).add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return builder if constraints is None else builder.add_extension(constraints, critical=True)


def _constraints_of(certificate: x509.Certificate) -> x509.NameConstraints | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.NameConstraints).value
    except x509.ExtensionNotFound:
        return None


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def alternative_name(dns_names: Sequence[str], uri_names: Sequence[str]) -> x509.SubjectAlternativeName:
    """Write the names of a leaf as its subject alternative name."""
    uris = [x509.UniformResourceIdentifier(uri) for uri in uri_names]
    return x509.SubjectAlternativeName([*map(x509.DNSName, dns_names), *uris])


def _authority_key_identifier(issuer: Issuer) -> x509.AuthorityKeyIdentifier:
    try:
        extension = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:  # an operator's old CA
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(extension.value)


def _hash(key: CAPrivateKey) -> hashes.SHA256 | hashes.SHA384 | None:
    if isinstance(key, MLDSAPrivateKey):  # hashes by itself (RFC 9881 section 3)
        return None
    # RFC 5480 section 4: a hash of the strength of the curve
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.key_size > 256:
        return hashes.SHA384()
    return hashes.SHA256()
