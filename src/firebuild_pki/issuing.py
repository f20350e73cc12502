"""The names of a build's two ends, and their verified `TLSMaterial`: a signed one, or a ready pair."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from firebuild_pki.chain import Chain
from firebuild_pki.errors import CAError, IdentityError, MaterialError
from firebuild_pki.keys import Keys, PrivateKey, is_usable, private_key_pem
from firebuild_pki.material import TLSMaterial
from firebuild_pki.provider import CAProvider, Clock, Profile, ReadyPair, SignRequest
from firebuild_pki.verify import Expectation, Trust, Verified, public_key_bytes, verify_certificate
from firebuild_pki.x509 import fingerprint, make_csr, to_pem

DEFAULT_TTL = timedelta(hours=1)
"""Lifetime asked for where the caller names neither a lifetime nor a later deadline."""

DEADLINE_MARGIN = timedelta(minutes=5)
"""How far beyond the deadline of a build the default lifetime reaches."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted of a provider.

    Args:
        identity: names of the build's two ends.
        profile: which of the ends.
        keys: where a new key comes from.
        clock: the current time, UTC; asked after the provider answered.
        ttl: wanted lifetime from now on.
        deadline: latest moment at which the build may need the certificate.
    """

    identity: Identity
    profile: Profile
    keys: Keys
    clock: Clock
    ttl: timedelta
    deadline: datetime

    @classmethod
    def placed(
        cls,
        identity: Identity,
        profile: Profile,
        keys: Keys,
        clock: Clock,
        *,
        ttl: timedelta | None,
        deadline: datetime | None,
    ) -> Order:
        """Fill in what the caller left open.

        Raises:
            CAError: the lifetime is not above zero, or the deadline has no timezone.
        """
        now = clock()
        if deadline is not None and deadline.tzinfo is None:
            raise CAError("expected a timezone-aware build_deadline, found a naive one")
        deadline = deadline or now
        if ttl is None:
            ttl = max(DEFAULT_TTL, deadline - now + DEADLINE_MARGIN)
        if ttl <= timedelta(0):
            raise CAError(f"expected a lifetime above zero, found {ttl.total_seconds():g} s")
        return cls(identity, profile, keys, clock, ttl, deadline)


@dataclass(frozen=True, slots=True)
class Issued:
    """Material that passed the checks, its chain, and what the checks remarked; see `Verified`."""

    material: TLSMaterial
    chain: Chain
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]


def by_signing(provider: CAProvider, trust: Trust, order: Order) -> Issued:
    """Make a key, have it signed, check the answer."""
    key = order.keys.take()
    names = (order.identity.of(order.profile),)
    csr = make_csr(key, names)
    request = SignRequest(csr, order.profile, names, order.ttl, order.identity.build_id)
    answer = provider.sign(request)
    expected = Expectation(
        order.profile, names, key.public_key(), order.clock(), order.deadline, ttl=order.ttl
    )
    try:
        verified = verify_certificate(answer.certificate_pem, answer.chain_pem, trust, expected)
    except MaterialError as error:  # what the backend remarked is often the reason
        error.hint = "; ".join(filter(None, [error.hint, *answer.notes])) or None
        raise
    material = _material(key, trust, verified, order, names=(order.identity.server, names[0]))
    return Issued(material, verified.chain, (*answer.notes, *verified.warnings), verified.remarks)


def by_ready_pair(provider: CAProvider, trust: Trust, order: Order) -> Issued:
    """Take the operator's own pair, check it; its name counts, not that of the build."""
    pair = provider.ready_pair(order.profile)
    server = pair if order.profile is Profile.SERVER else provider.ready_pair(Profile.SERVER)
    key = _ready_key(pair)
    expected = Expectation(
        order.profile, (pair.name,), key.public_key(), order.clock(), order.deadline, exact=False
    )
    verified = verify_certificate(pair.certificate_chain_pem, b"", trust, expected)
    material = _material(key, trust, verified, order, names=(server.name, pair.name))
    return Issued(material, verified.chain, verified.warnings, verified.remarks)


def _ready_key(pair: ReadyPair) -> PrivateKey:
    try:
        key: PrivateKeyTypes = serialization.load_pem_private_key(pair.private_key_pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the reason could quote the key
        raise MaterialError(f"the private key of {pair.name} is not an unencrypted PEM key") from None
    if not isinstance(key, PrivateKey) or not is_usable(key):
        raise MaterialError(f"gRPC needs a P-256, P-384 or RSA key, which that of {pair.name} is not")
    return key


def _material(
    key: PrivateKey, trust: Trust, verified: Verified, order: Order, *, names: tuple[str, str]
) -> TLSMaterial:
    leaf = verified.chain.leaf
    return TLSMaterial(
        certificate_chain_pem=to_pem(verified.chain.certificates),
        private_key_pem=private_key_pem(key),
        trust_pem=to_pem(_lasting(trust.anchors, verified.chain.anchor, order.deadline)),
        server_name=names[0],
        identity=names[1],
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        fingerprint_sha256=fingerprint(leaf),
    )


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


_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

MAX_NAME = 253
"""Upper bound of a DNS name in text form, RFC 1035 section 3.1."""


@dataclass(frozen=True, slots=True)
class Identity:
    """DNS names of the server and the guest of one build.

    Args:
        build_id: one DNS label (RFC 1123): lower-case letters, digits and inner dashes, at most 63.
        suffix: domain that the names are below.

    Raises:
        IdentityError: they do not make DNS names.
    """

    build_id: str
    suffix: str

    def __post_init__(self) -> None:
        if not _LABEL.fullmatch(self.build_id):
            raise IdentityError(
                f'expected a build id that is a DNS label, found "{self.build_id}"',
                hint="use 1 to 63 lower-case letters, digits and dashes, no dash at the ends",
            )
        if not all(_LABEL.fullmatch(label) for label in self.suffix.split(".")):
            raise IdentityError(
                f'expected a lower-case domain as name suffix, found "{self.suffix}"',
                hint="for example firebuild.internal",
            )
        if len(self.guest) > MAX_NAME:
            raise IdentityError(f"the name {self.guest} is longer than {MAX_NAME} characters")

    @property
    def server(self) -> str:
        """Name of the server, which the guest checks."""
        return f"{self.build_id}.{self.suffix}"

    @property
    def guest(self) -> str:
        """Name of the guest."""
        return f"guest.{self.server}"

    def of(self, profile: Profile) -> str:
        """Name of one end."""
        return self.server if profile is Profile.SERVER else self.guest


def random_build_id() -> str:
    """Make up an id that no other build has."""
    return secrets.token_hex(8)
