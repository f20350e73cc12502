"""The checks of `verify.py` that look at the leaf alone.

The musts raise `MaterialError`; the rest is returned as warnings and remarks.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_pki.chain import describe, extension_of, serial_of
from firebuild_pki.display import counted
from firebuild_pki.errors import MaterialError
from firebuild_pki.provider import Profile
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import one_text
from firebuild_pki.x509 import USAGE, alternative_name, usages_of

# Vault, step-ca, AWS Private CA and cfssl put both into a certificate unless told otherwise. Which end a
# certificate is for is settled without them: the guest demands the server's name, and the server the very
# certificate that it handed to the guest.
BOTH = frozenset(USAGE.values())
"""The extended key usages that a leaf may have, one too many being a warning."""

MAX_SERIAL_BITS = 159
"""Twenty bytes, the first bit of which is that of the sign."""

MIN_SERIAL_BITS = 56
"""A serial of 64 random bits is shorter than this in one case of 256."""


@dataclass(frozen=True, slots=True)
class LeafFindings:
    """What the checks of a leaf have to say, apart from what they refuse.

    Args:
        warnings: shown in every build.
        remarks: what is harmless.
    """

    warnings: tuple[str, ...]
    remarks: tuple[str, ...]


def check_leaf(
    leaf: x509.Certificate,
    profile: Profile,
    names: tuple[str, ...],
    *,
    exact: bool,
    uris: tuple[str, ...] = (),
) -> LeafFindings:
    """Check what the leaf is, whom it names and what it may be used for.

    Args:
        leaf: the certificate of the server, the guest or a peer.
        profile: which of them.
        names: the DNS names that must be in it.
        exact: whether other names, and usages besides `BOTH`, are forbidden; else both are allowed, the
            usages with a warning. anyExtendedKeyUsage is always forbidden.
        uris: the URIs that must be in it, as `names`.

    Raises:
        MaterialError: a must failed.
    """
    if is_ca(leaf):
        raise MaterialError(f"expected an end-entity certificate, but {describe(leaf)} is a CA")
    warnings = (
        *_names(leaf, names, uris, exact=exact),
        *_extended_usage(leaf, profile, exact=exact),
        *_key_usage(leaf),
        *_serial(leaf),
    )
    return LeafFindings(warnings, tuple(_harmless_usage(leaf)))


def is_ca(certificate: x509.Certificate) -> bool:
    """Tell whether the basic constraints call a certificate a CA (RFC 5280 section 4.2.1.9)."""
    constraints = extension_of(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """List the subject alternative names of a certificate, as text."""
    alternative = extension_of(certificate, x509.SubjectAlternativeName)
    return tuple(str(name.value) for name in alternative or ())


def _names(
    leaf: x509.Certificate, names: tuple[str, ...], uris: tuple[str, ...], *, exact: bool
) -> list[str]:
    found = set(extension_of(leaf, x509.SubjectAlternativeName) or ())
    expected = set(alternative_name(names, uris))
    if found == expected or (not exact and found > expected):
        return []
    wanted = ", ".join((*names, *uris)) + (" and nothing else" if found > expected else "")
    shown = one_text(", ".join(sorted(str(name.value) for name in found)), 500) or "none"
    raise MaterialError(f"expected a certificate for {wanted}, found subject alternative names: {shown}")


def _extended_usage(leaf: x509.Certificate, profile: Profile, *, exact: bool) -> list[str]:
    wanted = set(usages_of(profile))
    found = set(extension_of(leaf, x509.ExtendedKeyUsage) or ())
    if found == wanted:
        return []
    names, shown = (", ".join(sorted(map(_usage_name, one))) or "none" for one in (wanted, found))
    text = (
        f"expected the extended key usage {names} and nothing else in the "
        f"{profile} certificate, found: {shown}"
    )
    too_much = found - BOTH if exact else found & {ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if not wanted <= found or too_much:
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
    return [] if extension.critical else ["the key usage extension is not critical"]


def _harmless_usage(leaf: x509.Certificate) -> list[str]:
    usage = extension_of(leaf, x509.KeyUsage)
    if usage and usage.key_encipherment and isinstance(leaf.public_key(), ec.EllipticCurvePublicKey):
        # AWS Private CA's templates put it into every certificate
        return ["the key usage has keyEncipherment, which means nothing for an EC key"]
    return []


def _serial(leaf: x509.Certificate) -> list[str]:
    serial = serial_of(leaf)
    if serial <= 0:
        kind = "zero" if serial == 0 else "negative"
        raise MaterialError(
            f"the serial number of {describe(leaf)} is {kind}; RFC 5280 section 4.1.2.2 forbids that"
        )
    if serial.bit_length() > MAX_SERIAL_BITS:
        size = serial.bit_length() // 8 + 1
        raise MaterialError(
            f"the serial number of {describe(leaf)} has {counted(size, 'byte')}; "
            "RFC 5280 section 4.1.2.2 allows 20 at most"
        )
    if serial.bit_length() >= MIN_SERIAL_BITS:
        return []
    return ["the serial number looks shorter than 64 random bits"]
