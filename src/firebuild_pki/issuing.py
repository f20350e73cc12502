"""From an order to a verified certificate: signing a new key or a given CSR, or from a ready pair."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes, PrivateKeyTypes

from firebuild_pki.chain import Chain, describe, error_message, quiet_parsing
from firebuild_pki.errors import CAError, MaterialError, ProviderError
from firebuild_pki.keys import Keys, PrivateKey, is_usable, private_key_pem
from firebuild_pki.material import IssuedCertificate, TLSMaterial
from firebuild_pki.names import MAX_CSR, Names
from firebuild_pki.provider import (
    CAProvider,
    Clock,
    Profile,
    ReadyPair,
    RetryAfter,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.values import dataclass
from firebuild_pki.verify import (
    Expectation,
    Trust,
    Verified,
    public_key_bytes,
    verify_certificate,
    verify_trust,
)
from firebuild_pki.wrapping import one_text
from firebuild_pki.x509 import alternative_name, fingerprint, leaf_subject, make_csr, to_pem

DEFAULT_TTL = timedelta(hours=1)
"""Lifetime asked for where the caller names neither a lifetime nor a later deadline."""

DEADLINE_MARGIN = timedelta(minutes=5)
"""How far beyond the deadline of a build the default lifetime reaches."""

SAY_AFTER: Final = 3.0
"""Seconds after which it is said what a pending certificate waits for."""

_STEP: Final = 0.1
_MIN_PAUSE: Final = 0.05  # "ask again in 0 s" is no reason to ask without a pause
_RSA_BITS: Final = range(2048, 4097)
_CURVES: Final = ("secp256r1", "secp384r1")
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted of a provider.

    Args:
        profile: which end of a connection.
        names: all names of the certificate.
        build_id: for the backend's records.
        ttl: wanted lifetime from now on.
        deadline: latest moment at which the certificate may be needed.
        server_name: DNS name that a client is to check; see `TLSMaterial`.
        labels: for the backend's audit.
    """

    profile: Profile
    names: Names
    build_id: str
    ttl: timedelta
    deadline: datetime
    server_name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


def lifetime_for(
    now: datetime, ttl: timedelta | None, deadline: datetime | None
) -> tuple[timedelta, datetime]:
    """Fill in what the caller left open.

    Returns:
        The lifetime to ask for, and the moment up to which the certificate has to be valid.

    Raises:
        CAError: the lifetime is not above zero, or the deadline has no timezone.
    """
    if deadline is not None and deadline.tzinfo is None:
        raise CAError("expected a timezone-aware build_deadline, found a naive one")
    deadline = deadline or now
    if ttl is None:
        ttl = max(DEFAULT_TTL, deadline - now + DEADLINE_MARGIN)
    if ttl <= timedelta(0):
        raise CAError(f"expected a lifetime above zero, found {ttl.total_seconds():g} s")
    return ttl, deadline


@dataclass(frozen=True, slots=True)
class Waiting:
    """How to wait for a certificate that is pending.

    Args:
        limit: how long altogether, from the request on.
        pause: waits for some seconds, and raises what ends the wait.
        report: tells people in one line what is waited for.
        monotonic: seconds of a clock that is never set back.
    """

    limit: timedelta
    pause: Callable[[float], None] = time.sleep
    report: Callable[[str], None] = lambda _: None
    monotonic: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Backend:
    """An opened provider and what its answers are held against.

    Args:
        provider: isolated, see `GuardedProvider`.
        trust: its trust bundle.
        clock: the current time, UTC; asked after the provider answered.
        waiting: for certificates that are pending.
    """

    provider: CAProvider
    trust: Trust
    clock: Clock
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that passed the checks, its chain, and what the checks remarked; see `Verified`.

    Args:
        certificate: what was issued.
        key_pem: the key of the certificate; empty where somebody else has it.
    """

    certificate: IssuedCertificate
    key_pem: bytes = field(repr=False)
    chain: Chain
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def material(self) -> TLSMaterial:
        """The certificate with its key."""
        return self.certificate.with_key(self.key_pem)


def by_signing(backend: Backend, keys: Keys, order: Order) -> Issued:
    """Make a key, have it signed, check the answer."""
    key = keys.take()
    csr = make_csr(key, order.names.dns, order.names.uris)
    verified, notes = _signed(backend, order, csr, key.public_key())
    return _issued(backend.trust, verified, order, key, notes)


def for_request(backend: Backend, csr_pem: bytes, order: Order) -> Issued:
    """Have a request signed that somebody else made, after a look at it; see `checked_csr`."""
    csr = checked_csr(csr_pem, order.names)
    pem = csr.public_bytes(serialization.Encoding.PEM)  # and nothing that stood around it
    verified, notes = _signed(backend, order, pem, csr.public_key())
    return _issued(backend.trust, verified, order, None, notes)


def by_ready_pair(backend: Backend, order: Order) -> Issued:
    """Take the operator's own pair, check it; its name counts, not that of the build."""
    provider, profile = backend.provider, order.profile
    pair = provider.ready_pair(profile)
    server = pair if profile is Profile.SERVER else provider.ready_pair(Profile.SERVER)
    key = _ready_key(pair)
    expected = Expectation(
        profile, (pair.name,), key.public_key(), backend.clock(), order.deadline, exact=False
    )
    verified = verify_certificate(pair.certificate_chain_pem, b"", backend.trust, expected)
    found = Order(profile, Names((pair.name,)), order.build_id, order.ttl, order.deadline, server.name)
    return _issued(backend.trust, verified, found, key, ())


def awaited(provider: CAProvider, request: SignRequest, waiting: Waiting) -> SignedCertificate:
    """Ask for a certificate, and ask again while it is pending.

    Raises:
        ProviderError: it is still pending after the limit, or the provider wants more time than that.
    """
    begun, what = waiting.monotonic(), f"the {request.profile} certificate"
    limit = waiting.limit.total_seconds()
    told = ""
    answer = provider.sign(request)
    while isinstance(answer, RetryAfter):
        for_what = answer.reason or "the CA has not issued it yet"
        end = begun + limit
        if answer.seconds > limit or waiting.monotonic() >= end:
            state = f"is still pending after {limit:g} s"
            if waiting.monotonic() < end:
                state = f"is pending, and the CA wants to be asked again in {answer.seconds:g} s"
            raise ProviderError(
                f"{what} {state}: {for_what}",
                hint="look at the backend, or raise ca.issue_timeout",
                retryable=True,
            )
        # what is due after the end is asked for at the end, a last time
        due = min(waiting.monotonic() + max(answer.seconds, _MIN_PAUSE), end)
        while (left := due - waiting.monotonic()) > 0:
            waiting.pause(min(left, _STEP))
            if told != for_what and waiting.monotonic() - begun >= SAY_AFTER:
                told = for_what
                waiting.report(f"waiting for {what}, for {limit:g} s at most: {for_what}")
        answer = provider.poll(request, answer.handle)
    return answer


def checked_csr(csr_pem: bytes, names: Names) -> x509.CertificateSigningRequest:
    """Look at a request that somebody else made, and that is trusted in nothing.

    Some backends take names and extensions from the request, whatever they are told besides. So it has to
    have the names, and no other; any other extension is refused, CA:TRUE above all. Its signature proves that
    who made it has the key (RFC 2986 section 3).

    Raises:
        MaterialError: it is not like that.
    """
    if len(csr_pem) > MAX_CSR:
        raise MaterialError(f"expected a signing request of {MAX_CSR} bytes at most, found {len(csr_pem)}")
    try:
        with quiet_parsing():
            csr = x509.load_pem_x509_csr(csr_pem)
            key, proven = csr.public_key(), csr.is_signature_valid
            extensions, algorithm = list(csr.extensions), csr.signature_hash_algorithm
            attributes = len(csr.attributes)
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        failure = MaterialError(f"the signing request cannot be read: {error_message(error)}")
        failure.__cause__ = error
    else:
        problem = _key_problem(key)
        if problem is not None:
            raise MaterialError(f"the key of the signing request {problem}", hint="use P-256, P-384 or RSA")
        if not proven:
            raise MaterialError("the signature of the signing request is not by its own key")
        if not isinstance(algorithm, _HASHES):
            raise MaterialError("the signing request is not signed with SHA-256, SHA-384 or SHA-512")
        _must_ask_for(csr, extensions, names)
        if attributes > 1:  # the one with the extensions; others mean something to some backends
            raise MaterialError("the signing request has attributes besides its names")
        return csr
    raise failure


def _key_problem(key: CertificatePublicKeyTypes) -> str | None:
    if isinstance(key, rsa.RSAPublicKey):
        odd = key.key_size not in _RSA_BITS or key.public_numbers().e != 65537
        return (
            f"is RSA with {key.key_size} bits or an odd exponent; 2048 to 4096 are accepted" if odd else None
        )
    if isinstance(key, ec.EllipticCurvePublicKey):
        return None if key.curve.name in _CURVES else f"is on the curve {key.curve.name}"
    return f"is of the kind {type(key).__name__.removesuffix('PublicKey')}"


def _must_ask_for(
    csr: x509.CertificateSigningRequest,
    extensions: Sequence[x509.Extension[x509.ExtensionType]],
    names: Names,
) -> None:
    other = [one.oid.dotted_string for one in extensions if one.oid != x509.SubjectAlternativeName.oid]
    if other:
        shown = one_text(", ".join(other), 200)
        raise MaterialError(
            f"the signing request asks for the extension {shown}; names are all it may ask for"
        )
    found = [one.value for one in extensions if isinstance(one.value, x509.SubjectAlternativeName)]
    wanted = set(alternative_name(names.dns, names.uris))
    if not found or set(found[0]) != wanted:
        shown = ", ".join(sorted(str(name.value) for one in found for name in one)) or "none"
        raise MaterialError(
            f"expected a signing request for {', '.join(names.all)} and nothing else, "
            f"found subject alternative names: {one_text(shown, 500)}"
        )
    if csr.subject not in (x509.Name([]), leaf_subject(names.dns)):
        raise MaterialError(
            "expected a signing request without a subject, or with the first DNS name as common name, found "
            + one_text(csr.subject.rfc4514_string(), 300)
        )


def _signed(
    backend: Backend, order: Order, csr_pem: bytes, key: CertificatePublicKeyTypes
) -> tuple[Verified, tuple[str, ...]]:
    names = order.names
    request = SignRequest(
        csr_pem, order.profile, names.dns, order.ttl, order.build_id, names.uris, dict(order.labels)
    )
    answer = awaited(backend.provider, request, backend.waiting)
    expected = Expectation(
        order.profile, names.dns, key, backend.clock(), order.deadline, ttl=order.ttl, uris=names.uris
    )
    try:
        verified = verify_certificate(answer.certificate_pem, answer.chain_pem, backend.trust, expected)
    except MaterialError as error:
        rolled = _after_roll_over(backend, answer, expected)
        if rolled is None:  # what the backend remarked is often the reason
            error.hint = "; ".join(filter(None, [error.hint, *answer.notes])) or None
            raise
        verified = rolled
    return verified, answer.notes


def _after_roll_over(backend: Backend, answer: SignedCertificate, expected: Expectation) -> Verified | None:
    """Try what the provider announces by now: its CA may have rolled over since the authority was opened.

    What was issued before trusts the anchors of then, so those alone count; a new CA that an old one has
    cross-signed leads there.

    Returns:
        None if the certificate is as wrong by what the provider announces now.

    Raises:
        MaterialError: it is right, but nobody who was told of the old anchors would take it.
    """
    old = backend.trust
    try:
        bundle = backend.provider.trust_bundle()
        now = verify_trust(bundle, expected.now)
        if (now.anchors, now.intermediates) == (old.anchors, old.intermediates):
            return None
        found = verify_certificate(answer.certificate_pem, answer.chain_pem, now, expected)
    except CAError:
        return None
    between = to_pem([*old.intermediates, *now.intermediates])
    both = verify_trust(TrustBundle(to_pem(old.anchors), between), expected.now)
    try:
        return verify_certificate(answer.certificate_pem, answer.chain_pem, both, expected)
    except MaterialError:
        before, after = (", ".join(map(describe, one)) for one in (old.anchors, [found.chain.anchor]))
    raise MaterialError(
        f"the CA has rolled over since this authority was opened: the {expected.profile} certificate leads "
        f"to {after}, and what was issued before trusts {before} alone",
        hint="begin the build again; a new CA that the old one has cross-signed disturbs none that has begun",
    )


def _ready_key(pair: ReadyPair) -> PrivateKey:
    try:
        key: PrivateKeyTypes = serialization.load_pem_private_key(pair.private_key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the reason could quote the key
        raise MaterialError(f"the private key of {pair.name} is not an unencrypted PEM key") from None
    if not isinstance(key, PrivateKey) or not is_usable(key):
        raise MaterialError(f"gRPC needs a P-256, P-384 or RSA key, which that of {pair.name} is not")
    return key


def _issued(
    trust: Trust, verified: Verified, order: Order, key: PrivateKey | None, notes: tuple[str, ...]
) -> Issued:
    leaf, names = verified.chain.leaf, order.names.all
    certificate = IssuedCertificate(
        certificate_chain_pem=to_pem(verified.chain.certificates),
        trust_pem=to_pem(_lasting(trust.anchors, verified.chain.anchor, order.deadline)),
        server_name=order.server_name,
        identity=names[0],
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        fingerprint_sha256=fingerprint(leaf),
        names=names,
        profile=order.profile,
        ttl=order.ttl,
    )
    pem = b"" if key is None else private_key_pem(key)
    return Issued(certificate, pem, verified.chain, (*notes, *verified.warnings), verified.remarks)


def _lasting(
    anchors: Sequence[x509.Certificate], reached: x509.Certificate, deadline: datetime
) -> list[x509.Certificate]:
    """Leave out editions of an anchor that end during the build, where another one was found that does not.

    BoringSSL takes the first anchor with a fitting name and key; if it has expired, it looks for no other.
    """
    if all(one.not_valid_after_utc >= deadline for one in anchors):
        return list(anchors)
    key = public_key_bytes(reached.public_key())
    return [
        one
        for one in anchors
        if one == reached
        or one.not_valid_after_utc >= deadline
        or (one.subject, public_key_bytes(one.public_key())) != (reached.subject, key)
    ]
