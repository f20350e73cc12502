"""The checks of `verify.py` that look at the leaf alone.

The musts raise `MaterialError`; the rest is returned as warnings.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_pki.chain import describe
from firebuild_pki.errors import MaterialError
from firebuild_pki.provider import Profile
from firebuild_pki.x509 import USAGE

# Vault, step-ca, AWS Private CA and cfssl put both into a certificate unless told otherwise. Which end a
# certificate is for is settled without them: the guest demands the server's name, and the server the very
# certificate that it handed to the guest.
BOTH = frozenset(USAGE.values())
"""The extended key usages that a leaf may have, one too many being a warning."""

MIN_SERIAL_BITS = 56
"""A serial of 64 random bits is shorter than this in one case of 256."""


def check_leaf(leaf: x509.Certificate, profile: Profile, names: tuple[str, ...], *, exact: bool) -> list[str]:
    """Check what the leaf is, whom it names and what it may be used for.

    Args:
        leaf: the certificate of the server or the guest.
        profile: which of the two.
        names: the DNS names that must be in it.
        exact: whether other names, and usages besides `BOTH`, are forbidden; else both are allowed, the
            usages with a warning. anyExtendedKeyUsage is always forbidden.

    Returns:
        Warnings.

    Raises:
        MaterialError: a must failed.
    """
    if is_ca(leaf):
        raise MaterialError(f"expected an end-entity certificate, but {describe(leaf)} is a CA")
    return [
        *_names(leaf, names, exact=exact),
        *_extended_usage(leaf, profile, exact=exact),
        *_key_usage(leaf),
        *_serial(leaf),
    ]


def is_ca(certificate: x509.Certificate) -> bool:
    """Tell whether the basic constraints call a certificate a CA (RFC 5280 section 4.2.1.9)."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _names(leaf: x509.Certificate, names: tuple[str, ...], *, exact: bool) -> list[str]:
    wanted = ", ".join(names)
    try:
        found = list(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        found = []
    expected = {x509.DNSName(name) for name in names}
    shown = ", ".join(sorted(str(name.value) for name in found)) or "none"
    if not expected <= set(found):
        raise MaterialError(f"expected a certificate for {wanted}, found subject alternative names: {shown}")
    if not exact or expected == set(found):
        return []
    raise MaterialError(
        f"expected a certificate for {wanted} and nothing else, found subject alternative names: {shown}"
    )


def _extended_usage(leaf: x509.Certificate, profile: Profile, *, exact: bool) -> list[str]:
    wanted = USAGE[profile]
    try:
        found = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        found = set()
    if found == {wanted}:
        return []
    shown = ", ".join(sorted(map(_usage_name, found))) or "none"
    text = (
        f"expected the extended key usage {_usage_name(wanted)} and nothing else in the "
        f"{profile} certificate, found: {shown}"
    )
    too_much = found - BOTH if exact else found & {ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if wanted not in found or too_much:
        raise MaterialError(text)
    return [text]


def _usage_name(oid: x509.ObjectIdentifier) -> str:
    names = {
        ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
        ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
        ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "anyExtendedKeyUsage",
    }
    return names.get(oid, oid.dotted_string)


def _key_usage(leaf: x509.Certificate) -> list[str]:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        return ["the certificate has no key usage extension"]
    usage = extension.value
    if not usage.digital_signature:
        raise MaterialError("the key usage of the certificate lacks digitalSignature, which TLS 1.3 needs")
    if usage.key_cert_sign:
        raise MaterialError("the key usage of the certificate has keyCertSign; only a CA may")
    warnings = []
    if not extension.critical:
        warnings.append("the key usage extension is not critical")
    if usage.key_encipherment and isinstance(leaf.public_key(), ec.EllipticCurvePublicKey):
        warnings.append("the key usage has keyEncipherment, which means nothing for an EC key")
    return warnings


def _serial(leaf: x509.Certificate) -> list[str]:
    if leaf.serial_number.bit_length() >= MIN_SERIAL_BITS:
        return []
    return ["the serial number looks shorter than 64 random bits"]
