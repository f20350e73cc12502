"""The checks on everything that a provider hands back.

Each check is either a *must*, part of the contract, and raises `MaterialError`; or a *warn*, which
ends up in `Verified.warnings`. New checks start as warnings, so that a working plugin keeps
working, unless TLS refuses what they find anyway. What is harmless is a remark, shown by `ca check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    Policy,
    PolicyBuilder,
    ServerVerifier,
    Store,
    VerificationError,
)

from firebuild_pki.chain import (
    Chain,
    Links,
    chain_remarks,
    claim_problem,
    describe,
    error_message,
    extension_of,
    identifier_problem,
    leaf_key_problem,
    parse_certificates,
    readable,
    signature_problem,
)
from firebuild_pki.errors import MaterialError
from firebuild_pki.leaf_checks import check_leaf, is_ca
from firebuild_pki.provider import Profile, TrustBundle
from firebuild_pki.rfc5280 import (
    authority_problem,
    constraints_of,
    extension_problem,
    has_critical_policies,
    has_only_dns_names,
    name_problem,
    policy_problem,
    requires_policies,
)
from firebuild_pki.values import dataclass
from firebuild_pki.wrapping import one_text
from firebuild_pki.x509 import usages_of

_MAX_PATHS: Final = 100
_VERIFIERS_OWN: Final = re.compile(
    r"^validation failed: |\bcandidates exhausted: |\bPython extension validator failed: ValueError: "
)
"""What cryptography's verifier says of its own work in the reasons that it gives."""

TOLERANCE = timedelta(minutes=1)
"""Difference between asked and granted lifetime that rounding and slow backends explain."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What was asked for, and the time for which it has to hold.

    Args:
        profile: server, guest or peer.
        names: the DNS names wanted.
        public_key: the key that was to be certified.
        now: current time, UTC.
        ttl: requested lifetime; None for ready pairs.
        deadline: latest moment at which the build may still need the certificate.
        exact: whether names must match exactly, and the extended key usage up to the other end's.
            Ready pairs may have more of both.
        uris: the URIs wanted.
    """

    profile: Profile
    names: tuple[str, ...]
    public_key: PublicKeyTypes
    now: datetime
    deadline: datetime
    ttl: timedelta | None = None
    exact: bool = True
    uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trust:
    """A provider's trust bundle, parsed and checked.

    Args:
        anchors: what peers trust.
        intermediates: CAs between the anchors and the leaves.
        warnings: what was left out.
        links: what is known about these CAs.
        paths: those from the issuers that were returned with a leaf up to the anchors.
    """

    anchors: tuple[x509.Certificate, ...]
    intermediates: tuple[x509.Certificate, ...]
    warnings: tuple[str, ...] = ()
    links: Links = field(default_factory=Links, compare=False, repr=False)
    paths: dict[tuple[x509.Certificate, ...], tuple[CertificationPath, ...]] = field(
        default_factory=dict, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True)
class Verified:
    """A chain that passed every must.

    Args:
        chain: the leaf, and the path to its anchor.
        warnings: shown in every build.
        remarks: harmless, shown by `ca check` only.
    """

    chain: Chain
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def verify_trust(bundle: TrustBundle, now: datetime) -> Trust:
    """Check a trust bundle: readable, CAs only, an anchor that is valid now.

    Expired editions of a CA may be left in it for a while after it was renewed; they are left out.

    Raises:
        MaterialError: a check failed.
    """
    if not isinstance(bundle, TrustBundle):
        raise MaterialError(f"expected a TrustBundle, found {type(bundle).__name__}")
    with readable("the trust bundle"):
        anchors = parse_certificates(bundle.anchors_pem, "trust anchors")
        links = Links()
        intermediates = links.read(bundle.intermediates_pem, "intermediates")
        for certificate in (*anchors, *intermediates):
            if not is_ca(certificate):
                raise MaterialError(
                    f"{describe(certificate)} in the trust bundle is not a CA",
                    hint="leave it out: the certificate of a CA has basicConstraints=critical,CA:TRUE",
                )
        out = {one: reason for one in (*anchors, *intermediates) if (reason := out_of_date(one, now))}
        kept = tuple(dict.fromkeys(one for one in anchors if one not in out))
        if not kept:
            raise out[anchors[0]]
        return Trust(
            kept,
            tuple(dict.fromkeys(one for one in intermediates if one not in out)),
            tuple(f"{reason.message}; it is left out of the trust bundle" for reason in out.values()),
            links,
        )


def verify_certificate(
    certificate_pem: bytes | str, chain_pem: bytes | str, trust: Trust, expected: Expectation
) -> Verified:
    """Check what a provider returned against what was asked.

    Leaf and chain are taken as one set: the leaf is the certificate with the wanted key. Of several paths
    from it to an anchor, the first one is taken that holds.

    Raises:
        MaterialError: a must failed; the message says what was expected and what was found.
    """
    with readable("the certificate"):
        found = [*parse_certificates(certificate_pem, "certificate"), *trust.links.read(chain_pem)]
        leaf = _leaf_with_key(found, expected.public_key)
        found.remove(leaf)
        _must_be_valid(leaf, expected.now)
        about = check_leaf(leaf, expected.profile, expected.names, exact=expected.exact, uris=expected.uris)
        chain, reason = _path_that_holds(leaf, found, trust, expected)
        warnings = [*about.warnings, *_lifetime(leaf, expected), *reason, *_identifiers(chain)]
        if expected.exact and tuple(found) != chain.issuers:  # operators' own files may be in any order
            warnings += chain_remarks(leaf, found)
        return Verified(chain, tuple(warnings), about.remarks)


def _path_that_holds(
    leaf: x509.Certificate, found: Sequence[x509.Certificate], trust: Trust, expected: Expectation
) -> tuple[Chain, list[str]]:
    # Nearly every chain holds as it was returned. The search verifies each signature that validation verifies
    # again; it is for those that do not, and to say why.
    for path in _paths_returned(tuple(found), trust):
        if path.holds(leaf, expected):
            return path.below(leaf), []
    refused: list[tuple[datetime, MaterialError]] = []
    for chain in trust.links.paths(leaf, [*found, *trust.intermediates], trust.anchors):
        try:
            _must_last(chain, expected)
            return chain, _must_validate(chain, expected)
        except MaterialError as error:
            refused.append((min(one.not_valid_after_utc for one in chain.authorities), error))
    # of several editions of a CA, what is wrong with the latest is what can be mended
    raise max(refused, key=lambda one: one[0])[1]


def _paths_returned(issuers: tuple[x509.Certificate, ...], trust: Trust) -> tuple[CertificationPath, ...]:
    """Return the paths that the issuers make as they were returned, if their names are in order."""
    if issuers not in trust.paths:
        if len(trust.paths) > _MAX_PATHS:
            trust.paths.clear()
        trust.paths[issuers] = tuple(_paths_up(issuers, trust.anchors))
    return trust.paths[issuers]


def _paths_up(
    issuers: tuple[x509.Certificate, ...], anchors: Sequence[x509.Certificate]
) -> Iterator[CertificationPath]:
    names = [one.subject for one in anchors]
    if any(below.issuer != above.subject for below, above in pairwise(issuers)):
        return
    if any(
        one.issuer == one.subject or one.subject in names for one in issuers
    ):  # there may be a shorter path
        return
    for anchor, name in zip(anchors, names, strict=True):
        if not issuers or issuers[-1].issuer == name:
            yield CertificationPath(issuers, anchor)


class CertificationPath:
    """The CAs from an issuer up to an anchor (RFC 5280, section 6), and what of it is proven already.

    Once path validation has passed them above a leaf they are proven: what is above another leaf is the same,
    but for the time, and for the names and the usage that they allow.

    Args:
        issuers: the CAs below the anchor, from the bottom up.
        anchor: the last one.
    """

    def __init__(self, issuers: tuple[x509.Certificate, ...], anchor: x509.Certificate) -> None:
        self._issuers = issuers
        self._anchor = anchor
        self._authorities = (*issuers, anchor)
        self._issuer = self._authorities[0]
        self._start = max(one.not_valid_before_utc for one in self._authorities)
        self._end = min(one.not_valid_after_utc for one in self._authorities)
        self._constraints = constraints_of(self._authorities)
        # Extended key usages of CAs are about one kind of leaf.
        self._policed = requires_policies(issuers)
        self._restricted = any(extension_of(ca, x509.ExtendedKeyUsage) for ca in self._authorities)
        self._proven: set[Profile | None] = set()
        self._under_issuer = PolicyBuilder().store(Store([self._issuer]))

    def below(self, leaf: x509.Certificate) -> Chain:
        """Return the chain of a leaf."""
        return Chain(leaf, self._issuers, self._anchor)

    def holds(self, leaf: x509.Certificate, expected: Expectation) -> bool:
        """Tell whether a chain passes every check, strictly; no if it has to be looked at more closely."""
        own = signature_problem(leaf) or leaf_key_problem(leaf) or identifier_problem(leaf, self._issuer)
        if own or extension_problem(leaf) or not self._lasts(leaf, expected):
            return False
        usage = expected.profile if self._restricted else None
        # Of other kinds of name path validation has an opinion of its own.
        if (
            usage in self._proven
            and not self._policed
            and (not self._constraints or has_only_dns_names(leaf))
        ):
            permitted = not any(one.problem(leaf) for one in self._constraints)
            return permitted and _passes(self._under_issuer, self.below(leaf), expected, proven=True)
        holds = self._holds_whole(leaf, expected)
        if holds:
            self._proven.add(usage)
        return holds

    def _holds_whole(self, leaf: x509.Certificate, expected: Expectation) -> bool:
        steps = pairwise((leaf, *self._authorities))
        if any(claim_problem(*step) or identifier_problem(*step) for step in steps):
            return False
        chain = self.below(leaf)
        if (self._constraints and name_problem(chain)) or policy_problem(chain):
            return False
        if _authority_problem(chain, expected):
            return False
        return _passes(_strict(self._anchor), chain, expected)

    def _lasts(self, leaf: x509.Certificate, expected: Expectation) -> bool:
        end = min(self._end, leaf.not_valid_after_utc)
        return self._start <= expected.now <= self._end and expected.deadline <= end


def _strict(anchor: x509.Certificate) -> PolicyBuilder:
    return PolicyBuilder().store(Store([anchor]))


def public_key_bytes(key: PublicKeyTypes) -> bytes:
    """Encode a public key so that keys can be compared."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _leaf_with_key(found: Sequence[x509.Certificate], key: PublicKeyTypes) -> x509.Certificate:
    for certificate in found:
        try:
            if certificate.public_key() == key:
                return certificate
        except (ValueError, UnsupportedAlgorithm):  # not a key of ours
            continue
    raise MaterialError(
        f"the certificate {describe(found[0])} is for another public key than the one requested"
    )


def _must_be_valid(certificate: x509.Certificate, now: datetime) -> None:
    problem = out_of_date(certificate, now)
    if problem is not None:
        raise problem


def out_of_date(certificate: x509.Certificate, now: datetime) -> MaterialError | None:
    """Return what is wrong with the dates of a certificate, for the caller to raise; None if it is valid."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return MaterialError(
            f"{describe(certificate)} expired at {end:%Y-%m-%d %H:%M:%SZ}, now is {now:%Y-%m-%d %H:%M:%SZ}",
            hint="renew it, or set the clock of this machine",
        )
    if now < start:
        return MaterialError(
            f"{describe(certificate)} is not valid before {start:%Y-%m-%d %H:%M:%SZ}, "
            f"now is {now:%Y-%m-%d %H:%M:%SZ}",
            hint="compare the clocks of this machine and of the CA",
        )
    return None


def _must_last(chain: Chain, expected: Expectation) -> None:
    """Make sure that the CAs are valid, and that all of the chain is until the end of the build."""
    for issuer in chain.authorities:
        _must_be_valid(issuer, expected.now)
    for certificate in (chain.anchor, *reversed(chain.certificates)):  # a leaf ends with its CA
        end = certificate.not_valid_after_utc
        if end < expected.deadline:
            raise MaterialError(
                f"{describe(certificate)} is valid until {end:%Y-%m-%d %H:%M:%SZ}, "
                f"but the build may need it until {expected.deadline:%Y-%m-%d %H:%M:%SZ}",
                hint="shorten the build's timeout, or let the CA issue for longer",
            )


def _lifetime(leaf: x509.Certificate, expected: Expectation) -> list[str]:
    if expected.ttl is None:
        return []
    end, wanted = leaf.not_valid_after_utc, expected.now + expected.ttl
    if abs(end - wanted) <= TOLERANCE:
        return []
    what = "capped" if end < wanted else "extended"
    return [
        f"the CA {what} the lifetime of the {expected.profile} certificate: "
        f"asked until {wanted:%Y-%m-%d %H:%M:%SZ}, got {end:%Y-%m-%d %H:%M:%SZ}"
    ]


def _must_validate(chain: Chain, expected: Expectation) -> list[str]:
    refuses = f"path validation refuses the chain of {describe(chain.leaf)}"
    problem = leaf_key_problem(chain.leaf)
    if problem is not None:
        raise MaterialError(f"{describe(chain.leaf)} {problem}")
    # They say what is wrong in better words than path validation, and know what it does not.
    problem = name_problem(chain) or policy_problem(chain) or _authority_problem(chain, expected)
    if problem is not None:
        raise MaterialError(f"{refuses}: {problem}")
    # The Web PKI's profile is a warning: operators' CAs are often older than its rules, but
    # Python 3.13 and others that are just as strict would refuse what it refuses.
    strict = _strict(chain.anchor)
    reason = _path_failure(strict, chain, expected)
    if reason is None:
        return []
    lenient = strict.extension_policies(ca_policy=_lenient_ca(), ee_policy=_lenient_leaf())
    refusal = _path_failure(lenient, chain, expected)
    if refusal is None:
        return [f"strict TLS libraries may refuse the chain: {reason}"]
    if not constraints_of(chain.authorities) and not has_critical_policies(chain):
        raise MaterialError(f"{refuses}: {refusal}")
    # Constraints that this verifier refuses to read are none that TLS libraries refuse.
    return []


def _identifiers(chain: Chain) -> list[str]:
    # RFC 5280 sections 4.2.1.1 and 4.2.1.2; VERIFY_X509_STRICT, Python's default since 3.13, insists
    below = [
        (one, "authority")
        for one in chain.certificates
        if extension_of(one, x509.AuthorityKeyIdentifier) is None
    ]
    above = [
        (one, "subject") for one in chain.authorities if extension_of(one, x509.SubjectKeyIdentifier) is None
    ]
    return [
        f"strict TLS libraries may refuse {describe(certificate)}: it has no {word} key identifier"
        for certificate, word in (*below, *above)
    ]


def _path_failure(
    policy: PolicyBuilder, chain: Chain, expected: Expectation, *, proven: bool = False
) -> str | None:
    """Validate a path; of one whose CAs are proven, only up to the issuer, which the policy then trusts."""
    policy, leaf = policy.time(expected.now), chain.leaf
    issuers = [] if proven else list(chain.issuers)
    try:
        # A peer is both. One without a DNS name, as SPIFFE has it, is no server that this verifier knows.
        if expected.profile is not Profile.SERVER:
            policy.build_client_verifier().verify(leaf, issuers)
        if expected.profile is not Profile.GUEST and expected.names:
            _server_verifier(policy, leaf, expected.names[0]).verify(leaf, issuers)
    except VerificationError as error:
        return _VERIFIERS_OWN.sub("", error_message(error))
    return None


def _authority_problem(chain: Chain, expected: Expectation) -> str | None:
    problems = (authority_problem(chain, usage) for usage in usages_of(expected.profile))
    return next(filter(None, problems), None)


def _passes(policy: PolicyBuilder, chain: Chain, expected: Expectation, *, proven: bool = False) -> bool:
    try:
        return _path_failure(policy, chain, expected, proven=proven) is None
    except MaterialError:  # said by the search that follows
        return False


def _server_verifier(builder: PolicyBuilder, leaf: x509.Certificate, name: str) -> ServerVerifier:
    try:
        return builder.build_server_verifier(x509.DNSName(name))
    except ValueError as error:
        raise MaterialError(f"{one_text(name, 300)} in {describe(leaf)} is not a DNS name") from error


def _lenient_leaf() -> ExtensionPolicy:
    return ExtensionPolicy.permit_all().require_present(
        x509.SubjectAlternativeName, Criticality.AGNOSTIC, None
    )


def _lenient_ca() -> ExtensionPolicy:
    return (
        ExtensionPolicy.permit_all()
        .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
        .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _ca_may_sign)
        .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _ca_usage_fits)
    )


def _ca_may_sign(_policy: Policy, ca: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError(f"the key usage of {describe(ca)} does not allow signing certificates")


def _ca_usage_fits(policy: Policy, ca: x509.Certificate, usage: x509.ExtendedKeyUsage | None) -> None:
    accepted = {policy.extended_key_usage, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if usage is not None and not accepted & set(usage):
        raise ValueError(f"the extended key usage of {describe(ca)} forbids this kind of leaf")
