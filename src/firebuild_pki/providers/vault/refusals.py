"""What the server says when it refuses, and which setting of the role or mount to change."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAMES = (
    "allow the name on the role {role}: allowed_domains with the ca.name_suffix of this build, and "
    "allow_subdomains=true (allow_bare_domains for the domain itself, allow_glob_domains for patterns, "
    "allow_wildcard_certificates for *); cn_validations and enforce_hostnames may refuse it as well"
)

_HINTS: tuple[tuple[str, str], ...] = (
    (r"(common name|subject alternate name) \S+ not allowed", _NAMES),
    (
        r"role requires keys of type (\w+)",
        "set ca.key_type to a kind of {1} key, or key_type=any on the role {role} "
        "(gRPC can use rsa and ec, not ed25519)",
    ),
    (
        r"role requires a minimum of a (\d+)-bit key",
        "set ca.key_type to a key of {1} bits, or lower key_bits of the role {role}",
    ),
    (
        r"common_name field is required",
        "set require_cn=false on the role {role}; names above 64 characters do not fit a common name",
    ),
    (r"URI Subject Alternative Names? (are|is) not allowed", "set allowed_uri_sans on the role {role}"),
    (r"IP Subject Alternative Names? (are|is) not allowed", "set allow_ip_sans=true on the role {role}"),
    (r"other SAN OID", "set allowed_other_sans on the role {role}"),
    (
        r"beyond the expiration of the CA",
        "renew the CA, shorten the build's timeout, or set leaf_not_after_behavior=truncate on the issuer",
    ),
    (
        r"ttl or not_after should be provided|value for not_?after",
        "clear not_after of the role {role}, and set max_ttl instead",
    ),
    (r"unknown role", "set server_role and guest_role to roles of the mount {mount}: bao list {mount}/roles"),
    (r"no default issuer", "make or import a CA in the mount {mount}, or choose a default issuer"),
    (
        r"unable to find PKI issuer|could not fetch the CA certificate",
        "look at the setting issuer and at issuer_ref of the role {role}: bao list {mount}/issuers",
    ),
    (
        r"no handler for route|unsupported path|Invalid path for a versioned K/V",
        "set mount to the path of a PKI secrets engine: bao secrets list",
    ),
    (r"namespace not found", "look at the setting namespace: bao namespace list"),
    (
        r"ttl must be|TTL .* (negative|greater)",
        "look at ttl and max_ttl of the role {role} and of the mount {mount}",
    ),
)

_LASTING = re.compile(
    r"unable to find PKI issuer|could not fetch the CA certificate|no default issuer"
    r"|unable to verify signature on presented cert",
    re.IGNORECASE,
)

_IGNORED = re.compile(r"field was provided but the role is set with", re.IGNORECASE)
_CAPPED = re.compile(r"is longer than permitted maxTTL", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """What the hints name.

    Args:
        mount: path of the PKI mount.
        role: the role that was asked to sign.
    """

    mount: str
    role: str


def is_lasting(said: str) -> bool:
    """Tell a 500 that is about the settings, not about the server's health."""
    return bool(_LASTING.search(said))


def hint_for(said: str, place: Place) -> str | None:
    """Find the hint for a refusal; None for words that are not known."""
    for pattern, hint in _HINTS:
        found = re.search(pattern, said, re.IGNORECASE)
        if found:
            return hint.format(found[0], *found.groups(), mount=place.mount, role=place.role)
    return None


def worth_a_word(warning: str, place: Place) -> str | None:
    """Word a warning of the server; None for those that only say that the CSR was used."""
    text = " ".join(warning.split())
    if _IGNORED.search(text):
        return None
    if _CAPPED.search(text):
        return (
            f"{text} (raise max_ttl of the role {place.role}, or, where it has none, that of the mount: "
            f"bao secrets tune -max-lease-ttl=… {place.mount})"
        )
    return f"the server remarked: {text}"
