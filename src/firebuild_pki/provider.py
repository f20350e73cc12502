"""The types that the author of a provider sees.

All certificates cross this border as PEM, so a provider needs no particular crypto library.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from firebuild_pki.errors import ProviderLoadError, UnsupportedOperation
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from pydantic import BaseModel

    from firebuild_pki.keystores import KeyStoreSpec

API_VERSION = 1
"""Version of this contract; a provider names the one that it was written for."""

Clock = Callable[[], datetime]
"""Returns the current time, timezone-aware, in UTC."""

RESERVED_NAMES = frozenset(
    {"provider", "observers", "name_suffix", "key_type", "revoke_at_end", "call_timeout", "issue_timeout"}
)
"""Keys of the ``ca`` section that are not providers."""


def utc_now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class Profile(StrEnum):
    """Which end of a connection a certificate is for.

    Iteration yields the two ends, as that of a `Flag` leaves out its composite members: providers iterate to
    look at the setting of each end, and those written before there were peers go on working.
    """

    SERVER = "server"
    """Extended key usage serverAuth."""
    GUEST = "guest"
    """clientAuth: the guest of a build, or any other client."""
    CLIENT = "guest"
    """Another name of GUEST, for clients that are not guests of a build."""
    PEER = "peer"
    """serverAuth and clientAuth: a workload that accepts mutual TLS, and opens it to its like."""


Profile._member_names_.remove("PEER")  # what iteration goes by


class Capability(StrEnum):
    """What a provider can do."""

    SIGN = "sign"
    """Signs the framework's requests; the framework makes the key."""
    READY_PAIRS = "ready-pairs"
    """Holds finished pairs of certificate and key; there is nothing to sign with."""
    REVOKE = "revoke"
    """Can take back a certificate that it signed."""
    URI_NAMES = "uri-names"
    """Signs certificates with URIs as names, such as SPIFFE IDs."""
    PEER = "peer"
    """Signs certificates of the profile `Profile.PEER`, which have both usages."""


@dataclass(frozen=True, slots=True)
class ProviderContext:
    """What a provider may use of the world around it, so that tests can replace it.

    Args:
        clock: the current time.
        environ: environment variables; secret references are resolved with these.
        report: shows the user a sentence at once, for example that a backend gives no answer and is being
            tried again.
        patient: whether to try again what fails now and may work later; not where a user waits for a
            verdict, as in ``firebuild ca check``.
        name_suffix: domain that all names of the build are below; empty where it is not known.
        key_store: finds the key store of a scheme, for `open_key`; None where there are none.
        domain: the build's own, ``<build-id>.<suffix>``: its names are this one and those below it; empty
            where no build is at hand.
        names: what the caller wants to have certified besides, DNS names and URIs; a CA that is made for this
            build alone permits these names, too.
        lifetime: what `CAProvider.check` may expect to be asked for, in `SignRequest.ttl`.
    """

    clock: Clock
    environ: Mapping[str, str] = field(repr=False)
    report: Callable[[str], None] = field(default=lambda _: None, repr=False)
    patient: bool = True
    name_suffix: str = ""
    key_store: Callable[[str], KeyStoreSpec] | None = field(default=None, repr=False)
    domain: str = ""
    names: tuple[str, ...] = ()
    lifetime: timedelta = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """What a plugin registers.

    Args:
        name: name in the configuration; equals the name of the entry point.
        settings_model: pydantic model (best: a `Settings`) of the block ``ca.<name>``.
        factory: makes the provider from its validated settings; no I/O.
        summary: one line for listings.
        capabilities: SIGN or READY_PAIRS, and the others where they apply. Both of the first two where
            the settings decide; then the provider says which (`CAProvider.capabilities`).
        api_version: the version of the contract that the provider was written for.
    """

    name: str
    settings_model: type[BaseModel]
    factory: Callable[[Any, ProviderContext], CAProvider]
    summary: str
    capabilities: frozenset[Capability] = frozenset({Capability.SIGN})
    api_version: int = API_VERSION

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name) or self.name in RESERVED_NAMES:
            raise ProviderLoadError(
                f'"{self.name}" cannot be the name of a provider',
                hint="use lower-case letters, digits and dashes; not one of "
                + ", ".join(sorted(RESERVED_NAMES)),
            )
        if not self.capabilities & {Capability.SIGN, Capability.READY_PAIRS}:
            raise ProviderLoadError(
                "expected at least one of the capabilities sign and ready-pairs", provider=self.name
            )


class NoteLevel(StrEnum):
    """How much a note matters."""

    OK = "ok"
    """Looked at, and found to be right."""
    WARNING = "warning"
    """A warning; the provider works all the same."""
    FATAL = "fatal"
    """The provider cannot work like this."""


@dataclass(frozen=True, slots=True)
class Note:
    """A remark of a provider about its settings or its backend.

    Args:
        message: what was found.
        path: the setting it is about, below the provider's block (``auth.method``); may be empty.
        hint: what to change.
        level: how much it matters.
        about: what was looked at, in one or two words, for tables: ``role``, ``clock``.
    """

    message: str
    path: str = ""
    hint: str | None = None
    level: NoteLevel = NoteLevel.WARNING
    about: str = ""

    @property
    def fatal(self) -> bool:
        """Whether the provider cannot work like this."""
        return self.level is NoteLevel.FATAL

    def __str__(self) -> str:
        path = f"{self.path}: " if self.path else ""
        return f"{path}{self.message}" + (f" (hint: {self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True)
class SignRequest:
    """A certificate that the framework wants to have signed.

    Args:
        csr_pem: PKCS#10 request with the public key, the names, and a label as common name.
        profile: server gets the extended key usage serverAuth, guest clientAuth; one more of the two is a
            warning, anything else is refused. A peer gets both; capability PEER.
        dns_names: exactly the DNS names for the subject alternative name; may be empty if there are URIs.
        ttl: wanted lifetime from now on. A shorter one is accepted while it covers the build.
        build_id: for the backend's own records.
        uri_names: exactly the URIs for the subject alternative name; empty without capability URI_NAMES.
        labels: for the backend's own audit, such as the tag of an image; 16 at most, keys like DNS labels,
            values of 256 printable ASCII characters at most. The framework has checked that.
    """

    csr_pem: bytes
    profile: Profile
    dns_names: tuple[str, ...]
    ttl: timedelta
    build_id: str
    uri_names: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class SignedCertificate:
    """A provider's answer to a `SignRequest`.

    Args:
        certificate_pem: the leaf.
        chain_pem: its issuers from the bottom up, without leaf and root (`order_chain` makes
            that out of a heap). Anything else is repaired, with a warning, if it can be.
        notes: what the backend remarked, for example that it capped the lifetime.
    """

    certificate_pem: bytes
    chain_pem: bytes = b""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """The other answer to a `SignRequest`: the certificate is not there yet; `CAProvider.poll` asks again.

    The framework waits outside the provider's thread, for ``ca.issue_timeout`` altogether.

    Args:
        seconds: how long to wait before asking again; zero or more, and finite. Something that will never be
            issued is a `CAError` with the reason.
        handle: what `poll` needs to find the certificate, such as its ARN or the id of an order; 4096
            characters at most. Nobody else looks at it; it is never shown.
        reason: what is waited for, in a few words, for people: "an approver has to confirm order 12".
    """

    seconds: float
    handle: str = field(default="", repr=False)
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What the peers have to trust.

    Args:
        anchors_pem: at least one certificate; normally the root.
        intermediates_pem: issuers between the anchors and the leaves, the one that signs the
            leaves first.
    """

    anchors_pem: bytes
    intermediates_pem: bytes = b""


@dataclass(frozen=True, slots=True)
class ReadyPair:
    """A finished certificate of the operator with its key.

    Args:
        certificate_chain_pem: leaf and issuers, in any order.
        private_key_pem: unencrypted PEM.
        name: the DNS name in the certificate that is this party's identity.
    """

    certificate_chain_pem: bytes
    private_key_pem: bytes = field(repr=False)
    name: str


class CAProvider(ABC):
    """Base class of providers. The framework calls all methods from one thread, one at a time.

    A call may take as long as ``ca.call_timeout`` allows. Any exception may be raised: the
    framework wraps it, prefixed with the provider's name. A `CAError` with a hint serves the user
    better.
    """

    def capabilities(self) -> frozenset[Capability] | None:
        """Say what the settings make of the capabilities in the spec; pure. None: all of them."""
        return None

    def validate(self) -> Sequence[Note]:
        """Look at the settings only: pure, no I/O. Fatal notes stop the build before `open`."""
        return ()

    def open(self) -> None:  # noqa: B027 - optional
        """Log in, read files."""

    def close(self) -> None:  # noqa: B027 - optional
        """Drop keys and tokens. May be called twice, and after a failed `open`."""

    def check(self) -> Sequence[Note]:
        """Try without issuing: backend reachable and unsealed, role exists, CA valid long enough.

        Returns:
            A note for each thing looked at, also for those that are right.
        """
        return ()

    @abstractmethod
    def trust_bundle(self) -> TrustBundle:
        """Return the anchors; called after `open`."""

    def sign(self, request: SignRequest) -> SignedCertificate | RetryAfter:
        """Sign a request (capability SIGN), or say when to ask again for its certificate."""
        raise UnsupportedOperation(f"signing a {request.profile} certificate is not implemented")

    def poll(self, request: SignRequest, handle: str) -> SignedCertificate | RetryAfter:  # noqa: ARG002
        """Fetch the certificate that `sign` could not return yet; by default, ask `sign` again.

        Other requests may be signed in between.

        Args:
            request: as it was given to `sign`.
            handle: that of the last `RetryAfter` for this request.
        """
        return self.sign(request)

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """Return the operator's pair for one end of the connection (capability READY_PAIRS)."""
        raise UnsupportedOperation(f"a ready {profile} pair is not implemented")

    def revoke(self, certificate_pem: bytes) -> None:  # noqa: ARG002 - for overriding
        """Take back a certificate (capability REVOKE); unknown certificates are an error."""
        raise UnsupportedOperation("revoking is not implemented")


class EventKind(StrEnum):
    """What an observer can hear of."""

    ISSUED = "issued"
    REFUSED = "refused"
    REVOKED = "revoked"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class CAEvent:
    """Something an authority did. Later versions may add fields with defaults.

    Args:
        kind: what happened.
        time: when, UTC.
        provider: name of the provider.
        build_id: the build it was for.
        profile: server, guest or peer; None for CLOSED.
        names: DNS names and URIs of the certificate.
        serial: serial number in hexadecimal.
        fingerprint_sha256: of the certificate, in hexadecimal.
        not_before: start of the validity.
        not_after: end of the validity.
        reason: why it was refused.
        labels: those of the request.
        signature_algorithm: what the certificate is signed with: ``ECDSA with SHA-256``, ``ML-DSA-65``.
    """

    kind: EventKind
    time: datetime
    provider: str
    build_id: str
    profile: Profile | None = None
    names: tuple[str, ...] = ()
    serial: str | None = None
    fingerprint_sha256: str | None = None
    not_before: datetime | None = None
    not_after: datetime | None = None
    reason: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    signature_algorithm: str | None = None
