"""The rules of RFC 5280 for a path, as far as cryptography's verifier does not judge like TLS libraries do.

It calls some name constraints malformed that OpenSSL, BoringSSL (gRPC) and Go all understand, such as DNS
names with a leading dot, which many CAs carry, it knows no directory names, and it refuses critical
extensions about policies. Those libraries decide in the end whether a connection works, so for paths with
one or the other these are the rules: section 4.2.1.10 in their reading, and section 6.1 for each CA.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from firebuild_pki.chain import Chain, canonical_name, describe, extension_of
from firebuild_pki.wrapping import one_text

_ABOUT_POLICIES: Final = frozenset(
    {
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.POLICY_CONSTRAINTS,
        ExtensionOID.POLICY_MAPPINGS,
        ExtensionOID.INHIBIT_ANY_POLICY,
    }
)
# What OpenSSL and BoringSSL process; a critical extension besides has to be refused (section 4.2).
_PROCESSED: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        *_ABOUT_POLICIES,
    }
)
# TLS libraries read few extensions of an anchor; path validation lets these pass there.
_OF_ANCHORS: Final = _PROCESSED | {
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_INFORMATION_ACCESS,
}
_ANY_POLICY: Final = bytes.fromhex("0604551d2000")


def has_only_dns_names(leaf: x509.Certificate) -> bool:
    """Tell whether all names of a leaf, its subject aside, are DNS names without a wildcard.

    Of these, cryptography's verifier and TLS libraries have the same opinion, if it can read the constraints.
    """
    names = extension_of(leaf, x509.SubjectAlternativeName) or ()
    return all(type(one) is x509.DNSName and "*" not in one.value for one in names) and not (
        leaf.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS)
    )


def constraints_of(authorities: Iterable[x509.Certificate]) -> list[Constraints]:
    """Return the name constraints of some CAs; those that repeat another's are left out."""
    found: list[Constraints] = []
    for one in map(_constraints, authorities):
        if one is not None and all(one.value != other.value for other in found):
            found.append(one)
    return found


@lru_cache(maxsize=64)
def _constraints(ca: x509.Certificate) -> Constraints | None:
    value = extension_of(ca, x509.NameConstraints)
    return None if value is None else Constraints(ca, value)


def restricts_subjects(authorities: Iterable[x509.Certificate]) -> bool:
    """Tell whether one of some CAs permits certain subjects only; a certificate without one is within."""
    return any(
        isinstance(base, x509.DirectoryName)
        for constraints in constraints_of(authorities)
        for base in constraints.value.permitted_subtrees or ()
    )


def name_problem(chain: Chain) -> str | None:
    """Hold all names of a path against the name constraints above them; return what is wrong, or None."""
    path = (*chain.certificates, chain.anchor)
    for number, certificate in enumerate(path[:-1]):
        if number and certificate.subject == certificate.issuer:  # self-issued (section 6.1.3 b)
            continue
        for constraints in constraints_of(path[number + 1 :]):
            if problem := constraints.problem(certificate):
                return problem
    return None


class Constraints:
    """The name constraints of a CA, by kind of name.

    Args:
        ca: whose they are, for messages.
        value: what is permitted and excluded below it.
    """

    def __init__(self, ca: x509.Certificate, value: x509.NameConstraints) -> None:
        self.value = value
        self._ca = ca
        self._permitted = _by_kind(value.permitted_subtrees)
        self._excluded = _by_kind(value.excluded_subtrees)

    def problem(self, certificate: x509.Certificate) -> str | None:
        """Hold all names of a certificate against them; return what is wrong, or None."""
        for name in _names(certificate):
            kind = type(name)
            permitted, excluded = self._permitted.get(kind, []), self._excluded.get(kind, [])
            if not permitted and not excluded:
                continue
            within = _WITHIN.get(kind)
            if within is None:
                about = f"a kind of name ({kind.__name__}) that TLS libraries cannot judge"
                return f"{self._whose()} are about {about}"
            if permitted and not any(within(name, base) for base in permitted):
                bases = " and ".join(f'"{one_text(_shown(base), 100)}"' for base in permitted[:5])
                shown = f'"{one_text(_shown(name), 300)}" in {describe(certificate)}'
                return f"{self._whose()} do not permit the name {shown}, only {bases} and what is below"
            for base in excluded:
                if within(name, base):
                    shown = f'"{one_text(_shown(name), 300)}" in {describe(certificate)}'
                    return f'{self._whose()} exclude the name {shown}: "{one_text(_shown(base), 100)}"'
        return None

    def _whose(self) -> str:
        return f"the name constraints of {describe(self._ca)}"


def _by_kind(bases: Iterable[x509.GeneralName] | None) -> dict[type, list[x509.GeneralName]]:
    found: dict[type, list[x509.GeneralName]] = {}
    for base in bases or ():
        found.setdefault(type(base), []).append(base)
    return found


def authority_problem(chain: Chain, usage: x509.ObjectIdentifier) -> str | None:
    """Hold a path against what TLS libraries demand of its CAs; return what is wrong, or None.

    Args:
        chain: the path.
        usage: the extended key usage of its leaf.
    """
    return next(_authority_problems(chain, usage), None)


def _authority_problems(chain: Chain, usage: x509.ObjectIdentifier) -> Iterator[str]:
    for certificate in (*chain.certificates, chain.anchor):
        if problem := extension_problem(certificate, is_anchor=certificate is chain.anchor):
            yield problem
    between = 0  # CAs below, those that only renew a key aside (section 6.1.4 l)
    for ca in chain.authorities:
        constraints = extension_of(ca, x509.BasicConstraints)
        if constraints is None or not constraints.ca:
            yield f"{describe(ca)} is not a CA"
        elif constraints.path_length is not None and constraints.path_length < between:
            yield f"the path length of {describe(ca)} allows {constraints.path_length} CAs below it"
        allowed = extension_of(ca, x509.KeyUsage)
        if allowed is not None and not allowed.key_cert_sign:
            yield f"the key usage of {describe(ca)} does not allow signing certificates"
        # OpenSSL and BoringSSL want the very usage: anyExtendedKeyUsage is none to them, but in an anchor
        accepted = {usage} if ca is not chain.anchor else {usage, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
        purposes = extension_of(ca, x509.ExtendedKeyUsage)
        if purposes is not None and accepted.isdisjoint(purposes):
            yield f"the extended key usage of {describe(ca)} forbids this kind of leaf"
        between += ca.subject != ca.issuer


def extension_problem(certificate: x509.Certificate, *, is_anchor: bool = False) -> str | None:
    """Tell why TLS libraries refuse a certificate for one of its extensions alone; None if they do not.

    Args:
        certificate: a leaf or a CA.
        is_anchor: whether it is the trust anchor, of which they read less.
    """
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in (_OF_ANCHORS if is_anchor else _PROCESSED):
            oid, whose = extension.oid.dotted_string, describe(certificate)
            if extension.oid in _OF_ANCHORS:
                return f"{whose} has the extension {oid} as a critical one, which it must not be"
            return f"{whose} has the critical extension {oid}, which is unknown"
        problem = _form_problem(certificate, extension.value, is_anchor=is_anchor)
        if problem is not None:
            return f"{describe(certificate)} {problem}"
    return None


def _form_problem(certificate: x509.Certificate, value: x509.ExtensionType, *, is_anchor: bool) -> str | None:
    if isinstance(value, x509.NameConstraints):
        # cryptography drops minimum and maximum, which nobody understands (section 4.2.1.10)
        as_read = value.public_bytes() in certificate.tbs_certificate_bytes
        return None if as_read else "has name constraints with a minimum or a maximum"
    if is_anchor:  # section 6.1 has nothing to say of its policies
        return None
    if isinstance(value, x509.CertificatePolicies):
        found = [one.policy_identifier.dotted_string for one in value]
        if len(set(found)) < max(len(found), 1):
            return "names a policy twice" if found else "has an empty list of policies"
    is_mapping = value.oid == ExtensionOID.POLICY_MAPPINGS  # which cryptography does not parse
    if is_mapping and isinstance(value, x509.UnrecognizedExtension) and _ANY_POLICY in value.value:
        return "maps anyPolicy, or to it"  # section 4.2.1.5
    return None


def has_critical_policies(chain: Chain) -> bool:
    """Tell whether a path has critical extensions about policies."""
    return any(
        extension.critical and extension.oid in _ABOUT_POLICIES
        for certificate in (*chain.certificates, chain.anchor)
        for extension in certificate.extensions
    )


def requires_policies(authorities: Iterable[x509.Certificate]) -> bool:
    """Tell whether one of some CAs may want policies to be named below it; an anchor has no say in it."""
    found = (extension_of(ca, x509.PolicyConstraints) for ca in authorities)
    return any(one is not None and one.require_explicit_policy is not None for one in found)


def policy_problem(chain: Chain) -> str | None:
    """Tell which certificate of a path names no policy where a CA above requires it; None if none does.

    Which policies they are is left to TLS libraries: without any, BoringSSL refuses the path.
    """
    if not requires_policies(chain.issuers):
        return None
    required_by = chain.anchor
    free = len(chain.certificates) + 1  # how many below need none (section 6.1.2 d)
    nameless = None
    for certificate in reversed(chain.certificates):
        if nameless is None and extension_of(certificate, x509.CertificatePolicies) is None:
            nameless = certificate
        if certificate is chain.leaf:  # counts itself (section 6.1.5 a)
            free = max(free - 1, 0)
        if nameless is not None and not free:
            return f"{describe(required_by)} requires a policy, and {describe(nameless)} names none"
        if certificate.subject != certificate.issuer:
            free = max(free - 1, 0)
        own = extension_of(certificate, x509.PolicyConstraints)
        if own is not None and own.require_explicit_policy is not None and own.require_explicit_policy < free:
            free, required_by = own.require_explicit_policy, certificate
    return None


def _names(certificate: x509.Certificate) -> Iterator[x509.GeneralName]:
    if certificate.subject.rdns:
        yield x509.DirectoryName(certificate.subject)
    for mail in certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
        yield x509.RFC822Name(str(mail.value))
    yield from extension_of(certificate, x509.SubjectAlternativeName) or ()


def _shown(name: x509.GeneralName) -> str:
    return name.value.rfc4514_string() if isinstance(name, x509.DirectoryName) else str(name.value)


def _dns_within(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    wanted, found = str(base.value).lower(), str(name.value).lower()
    # "a.b" covers itself and all below, ".a.b" only what is below, "" everything
    return not wanted or found == wanted or found.endswith(f".{wanted.removeprefix('.')}")


def _host_within(host: str, base: str) -> bool:
    # of URIs and e-mail addresses a leading dot covers hosts below, anything else that host alone
    host, base = host.lower(), base.lower()
    return host.endswith(base) if base.startswith(".") else host == base


def _uri_within(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    try:
        host = urlsplit(str(name.value)).hostname or ""
    except ValueError:
        return False
    return _host_within(host, str(base.value))


def _mail_within(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    found, wanted = str(name.value), str(base.value)
    if "@" in wanted:
        return found.rpartition("@")[0] == wanted.rpartition("@")[0] and _host_within(
            found.rpartition("@")[2], wanted.rpartition("@")[2]
        )
    return _host_within(found.rpartition("@")[2], wanted)


def _address_within(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    network, found = base.value, name.value
    if isinstance(network, ipaddress.IPv4Network):
        return isinstance(found, ipaddress.IPv4Address) and found in network
    return (
        isinstance(network, ipaddress.IPv6Network)
        and isinstance(found, ipaddress.IPv6Address)
        and found in network
    )


def _directory_within(name: x509.GeneralName, base: x509.GeneralName) -> bool:
    wanted, found = canonical_name(base.value), canonical_name(name.value)
    return found[: len(wanted)] == wanted


_WITHIN: Final[dict[type, Callable[[x509.GeneralName, x509.GeneralName], bool]]] = {
    x509.DNSName: _dns_within,
    x509.UniformResourceIdentifier: _uri_within,
    x509.RFC822Name: _mail_within,
    x509.IPAddress: _address_within,
    x509.DirectoryName: _directory_within,
}
