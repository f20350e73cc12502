"""The facade: open an authority, issue material for server, guest or any workload, tell observers, close it.

Everything a provider returns goes through `verify.py` before anyone else sees it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Self

from cryptography import x509
from pydantic import BaseModel

from firebuild_pki import crossing
from firebuild_pki.chain import describe, extension_of, parse_certificates, serial_of, signed_with
from firebuild_pki.config import CASettings, validate
from firebuild_pki.display import one_line
from firebuild_pki.documents import Document
from firebuild_pki.errors import (
    AuthorityClosed,
    CAError,
    IdentityError,
    MaterialError,
    ProviderError,
    UnsupportedOperation,
)
from firebuild_pki.guarded import make_provider, provider_context, settings_notes
from firebuild_pki.issuing import (
    DEFAULT_TTL,
    Backend,
    Issued,
    Order,
    Waiting,
    awaited,
    by_ready_pair,
    by_signing,
    for_request,
    lifetime_for,
)
from firebuild_pki.keys import Keys
from firebuild_pki.leaf_checks import is_ca, names_of
from firebuild_pki.material import IssuedCertificate, TLSMaterial
from firebuild_pki.names import Identity, Names, checked_labels, random_build_id
from firebuild_pki.plugins import Observer, PluginCatalog
from firebuild_pki.provider import (
    CAEvent,
    Capability,
    Clock,
    EventKind,
    Note,
    Profile,
    ProviderContext,
    SignedCertificate,
    SignRequest,
    utc_now,
)
from firebuild_pki.values import dataclass
from firebuild_pki.verify import Trust, verify_trust
from firebuild_pki.worker import Unanswered, Worker
from firebuild_pki.wrapping import described, named
from firebuild_pki.x509 import USAGE, fingerprint, to_pem

_OTHER_PROVIDER = (
    "embedded, file, vault and cfssl can; `firebuild ca providers` lists what each installed one can"
)


@dataclass(frozen=True, slots=True)
class _Revocable:
    """A certificate that was issued, and what for."""

    profile: Profile
    names: tuple[str, ...]
    leaf: x509.Certificate
    labels: Mapping[str, str]


class Authority:
    """An open certificate authority for one build; made by `open_authority`.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        settings: CASettings,
        identity: Identity,
        context: ProviderContext,
        check: Callable[[], None],
        labels: Mapping[str, str],
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._labels = labels
        self._announced = {identity.server, identity.guest, *context.names}
        self._clock = context.clock
        self._check = check
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._warnings: list[str] = []
        self._remarks: list[str] = []
        # Names and certificates, for revoking them; the keys are not kept.
        self._issued: dict[str, _Revocable] = {}
        self._keys = Keys(settings.key_type)
        self._provider = make_provider(settings, context, check)
        self._observers = Observers(
            tuple(Listener(*selected) for selected in settings.selected_observers),
            provider=settings.provider,
            build_id=identity.build_id,
            clock=context.clock,
            warn=self._warn,
        )
        self._closed = False
        self._issuer: x509.Certificate | None = None
        self._trust = self._open()
        waiting = Waiting(settings.issue_timeout, self._pause, context.report)
        self._backend = Backend(self._provider, self._trust, context.clock, waiting)

    @property
    def provider_name(self) -> str:
        """Name of the provider, as in the configuration."""
        return self._settings.provider

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What the provider can do with its settings."""
        return self._provider.capabilities()

    @property
    def build_id(self) -> str:
        """The build that this authority is for."""
        return self._identity.build_id

    @property
    def trust_pem(self) -> bytes:
        """The anchors that server and guest check each other against."""
        return to_pem(self._trust.anchors)

    @property
    def issuer_fingerprint(self) -> str:
        """SHA-256 of the certificate that signs the leaves, in hexadecimal.

        Until something was issued this is what the provider announced: its first intermediate,
        or its first anchor.
        """
        with self._lock:
            announced = (*self._trust.intermediates, *self._trust.anchors)[0]
            return fingerprint(self._issuer or announced)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings so far; also logged."""
        with self._lock:
            return tuple(self._warnings)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Harmless oddities of the certificates so far, shown by `ca check` only."""
        with self._lock:
            return tuple(self._remarks)

    def issue_server(
        self, *, ttl: timedelta | None = None, build_deadline: datetime | None = None
    ) -> TLSMaterial:
        """Make key and certificate for the build's server.

        Args:
            ttl: wanted lifetime from now on; by default an hour, or until a little after the
                deadline if that is later. The CA may grant less, which is a warning.
            build_deadline: moment up to which the certificate must be valid, timezone-aware.

        Raises:
            AuthorityClosed: the authority was closed.
            ProviderError: the provider failed.
            MaterialError: what it returned fails the checks, or does not cover the deadline.
        """
        server = self._identity.server
        return self.issue(Profile.SERVER, server, ttl, build_deadline=build_deadline, server_name=server)

    def issue_guest(
        self, *, ttl: timedelta | None = None, build_deadline: datetime | None = None
    ) -> TLSMaterial:
        """Make key and certificate for the build's guest; see `issue_server`."""
        identity = self._identity
        return self.issue(
            Profile.GUEST, identity.guest, ttl, build_deadline=build_deadline, server_name=identity.server
        )

    def issue(
        self,
        profile: Profile,
        names: str | Iterable[str],
        ttl: timedelta | None = None,
        *,
        build_deadline: datetime | None = None,
        server_name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> TLSMaterial:
        """Make key and certificate for any workload.

        Args:
            profile: `Profile.SERVER`, `Profile.CLIENT`, or `Profile.PEER` for a workload that is both.
            names: DNS names and URIs, such as a SPIFFE ID; the first one of each kind matters most. A server
                has a DNS name, which its clients check.
            ttl: as of `issue_server`.
            build_deadline: as of `issue_server`.
            server_name: DNS name that this end has to check in its server; for a server or peer by default
                its own first one.
            labels: for the backend's audit, added to those of the authority; see `SignRequest`.

        Raises:
            AuthorityClosed: the authority was closed, perhaps while the certificate was pending.
            IdentityError: the names or labels are none.
            UnsupportedOperation: the provider cannot issue such a certificate.
            ProviderError: the provider failed, or the certificate is pending after ``ca.issue_timeout``.
            MaterialError: what it returned fails the checks, or does not cover the deadline.
        """
        order = self._order(profile, names, ttl, build_deadline, server_name=server_name, labels=labels)
        ready = Capability.READY_PAIRS in self.capabilities
        return self._issue(
            order,
            lambda: (
                by_ready_pair(self._backend, order) if ready else by_signing(self._backend, self._keys, order)
            ),
        ).material

    def sign_csr(
        self,
        csr_pem: bytes,
        profile: Profile,
        names: str | Iterable[str],
        ttl: timedelta | None = None,
        *,
        build_deadline: datetime | None = None,
        server_name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> IssuedCertificate:
        """Have a request signed that the holder of a key made, for example a guest; the key stays there.

        The caller decides on the names, not the request: it has exactly these, and no other extension.
        Its key has to be P-256, P-384 or RSA, and its signature by that key.

        Args:
            csr_pem: PKCS#10, PEM, 400 KiB at most; untrusted.
            profile: as of `issue`, and so are the others.
            names: what the certificate, and the request, are for.
            ttl: wanted lifetime from now on.
            build_deadline: moment up to which it must be valid.
            server_name: DNS name to check in the server.
            labels: for the backend's audit.

        Raises:
            MaterialError: the request is not like that.
            CAError: as `issue` raises them.
        """
        order = self._order(profile, names, ttl, build_deadline, server_name=server_name, labels=labels)
        return self._issue(order, lambda: for_request(self._backend, csr_pem, order)).certificate

    def renew(
        self, material: TLSMaterial, *, ttl: timedelta | None = None, build_deadline: datetime | None = None
    ) -> TLSMaterial:
        """Issue the successor of a certificate: the same profile, names and labels, and a new key.

        The old one stays valid until its end: connections go on, and peers may be told one after the other.

        Args:
            material: what to renew; `TLSMaterial.renewal_due` tells when.
            ttl: wanted lifetime; by default what was asked for the last time.
            build_deadline: moment up to which the new one must be valid.

        Raises:
            CAError: as `issue` raises them.
        """
        if material.profile is None:
            raise UnsupportedOperation(
                "only what an authority issued can be renewed", provider=self.provider_name
            )
        with self._lock:
            known = self._issued.get(material.fingerprint_sha256)
            now = self._clock()  # a workload that renews for months must not fill the memory
            for old in [one for one, it in self._issued.items() if it.leaf.not_valid_after_utc < now]:
                del self._issued[old]
        return self.issue(
            material.profile,
            material.names,
            ttl or material.ttl,
            build_deadline=build_deadline,
            server_name=material.server_name,
            labels=known.labels if known else None,
        )

    def check(self) -> tuple[Note, ...]:
        """Try the backend without issuing anything.

        Returns:
            What the provider remarked.

        Raises:
            ProviderError: the provider failed, or a remark is fatal.
            MaterialError: the CA's own certificates are not usable.
        """
        notes = self.examine()
        fatal = [note for note in notes if note.fatal]
        if fatal:
            raise ProviderError("; ".join(map(str, fatal)), provider=self.provider_name)
        return notes

    def examine(self) -> tuple[Note, ...]:
        """Try the backend as `check` does, and return fatal remarks along with the others."""
        with self._lock, named(self.provider_name):
            self._require_open()
            notes = self._provider.check()
            verify_trust(self._provider.trust_bundle(), self._clock())
            return notes

    def revoke(self, material: TLSMaterial) -> None:
        """Take back a certificate.

        Raises:
            UnsupportedOperation: the provider cannot revoke.
            ProviderError: the provider failed.
        """
        with self._lock:
            self._require_open()
            (leaf, *_) = parse_certificates(material.certificate_chain_pem, "material to revoke")
            server = material.identity == self._identity.server
            profile = material.profile or (Profile.SERVER if server else Profile.GUEST)
            self._revoke(_Revocable(profile, material.names or (material.identity,), leaf, self._labels))

    def signed_unchecked(self, request: SignRequest) -> SignedCertificate:
        """Have the provider sign a request and return its answer as it is, for a look into the provider.

        Nothing vouches for such a certificate: it is for showing that peers refuse it.

        Raises:
            ProviderError: the provider failed.
        """
        with self._lock:
            self._require_open()
            return awaited(self._provider, request, self._backend.waiting)

    def revoke_certificate(self, certificate_pem: bytes, *, issuer_gone: bool = False) -> None:
        """Take back a certificate that any authority of this provider issued.

        Args:
            certificate_pem: the certificate; what comes after it, such as its chain, is left out.
            issuer_gone: whether a certificate will do that none of the provider's present CAs signed, because
                they were renewed meanwhile.

        Raises:
            UnsupportedOperation: the provider cannot revoke.
            MaterialError: it cannot be read, is that of a CA, or another CA issued it.
            ProviderError: the provider failed.
        """
        with self._lock, named(self.provider_name):
            self._require_open()
            (leaf, *_) = parse_certificates(certificate_pem, "certificate to revoke")
            if is_ca(leaf):
                raise MaterialError(
                    f"{describe(leaf)} is a CA: expected the certificate of a server or guest"
                )
            authorities = (*self._trust.intermediates, *self._trust.anchors)
            if not issuer_gone and all(self._trust.links.problem(leaf, one) for one in authorities):
                known = ", ".join(describe(one) for one in authorities)
                raise MaterialError(
                    f"{describe(leaf)} was not issued by a CA of this provider, which are: {known}",
                    hint="choose the configuration that issued it",
                )
            self._provider.revoke(to_pem([leaf]))
            usage = extension_of(leaf, x509.ExtendedKeyUsage) or ()
            profile = next((one for one in USAGE if USAGE[one] in usage), None)
            self._observers.tell(EventKind.REVOKED, profile, leaf, names_of(leaf))

    def close(self) -> None:
        """Let the provider drop keys and tokens. Closing twice is fine; a failure is a warning."""
        with self._lock:
            if self._closed:
                return
            try:
                if self._settings.revoke_at_end and Capability.REVOKE in self.capabilities:
                    self._revoke_all()
            finally:  # an interruption must not leave a token behind
                self._closed = True
                self._changed.notify_all()  # whoever waits for a certificate that is pending
                self._keys.drop()
                self._close_provider()
                self._observers.tell(EventKind.CLOSED)
                self._observers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Authority {self.provider_name} for build {self.build_id}, {state}>"

    def _open(self) -> Trust:
        abandon = self._provider.discard
        try:
            for note in settings_notes(self._settings, self._provider):
                self._warn(f"ca.{self.provider_name}: {note}")
            abandon = self._close_provider
            if Capability.SIGN in self.capabilities:
                self._keys.begin(2)  # the server's and the first guest's
            bundle = self._provider.opened()
            with named(self.provider_name):
                trust = verify_trust(bundle, self._clock())
            for warning in trust.warnings:
                self._warn(warning)
            return trust
        except BaseException:
            abandon()
            self._observers.close()
            raise

    def _order(
        self,
        profile: Profile,
        names: str | Iterable[str],
        ttl: timedelta | None,
        deadline: datetime | None,
        *,
        server_name: str | None,
        labels: Mapping[str, str] | None,
    ) -> Order:
        profile = Profile(profile)
        wanted = Names.of(names)
        if profile is Profile.SERVER and not wanted.dns:
            raise IdentityError(
                f"expected a DNS name for a server, found {wanted.uris[0]} alone",
                hint="clients check it; what is known by its URI is a Profile.PEER",
            )
        if server_name is None:
            server_name = wanted.dns[0] if wanted.dns and profile is not Profile.GUEST else ""
        ttl, deadline = lifetime_for(self._clock(), ttl, deadline)
        more = checked_labels({**self._labels, **labels}) if labels else self._labels
        return Order(profile, wanted, self.build_id, ttl, deadline, server_name, more)

    def _issue(self, order: Order, obtain: Callable[[], Issued]) -> Issued:
        with self._lock:
            self._require_open()
            try:
                with named(self.provider_name):
                    self._must_be_able_to(order)
                    issued = obtain()
            except CAError as error:
                names = order.names.all
                constrained = isinstance(error, MaterialError) and "name constraints" in error.message
                if constrained and not self._announced.issuperset(names):
                    error.hint = error.hint or "announce the names: open_authority(names=…)"
                self._observers.tell(
                    EventKind.REFUSED, order.profile, names=names, reason=error.message, labels=order.labels
                )
                raise
            for warning in issued.warnings:
                self._warn(warning)
            self._remarks += [one for one in issued.remarks if one not in self._remarks]
            self._issuer, leaf = issued.chain.issuer, issued.chain.leaf
            one = _Revocable(order.profile, issued.certificate.names, leaf, order.labels)
            # What is neither taken back nor renewed with labels of its own only makes the next ones slower.
            if self._settings.revoke_at_end or order.labels != self._labels:
                self._issued[issued.certificate.fingerprint_sha256] = one
            self._observers.tell(EventKind.ISSUED, order.profile, leaf, one.names, labels=order.labels)
            return issued

    def _must_be_able_to(self, order: Order) -> None:
        can, own = self.capabilities, (self._identity.of(order.profile),)
        if Capability.READY_PAIRS in can and (order.names.all != own or order.profile is Profile.PEER):
            raise UnsupportedOperation(
                f"there is nothing to sign a certificate for {', '.join(order.names.all)} with: "
                "the provider holds finished certificates for a build's two ends",
                hint="give it a CA that signs, or choose another provider",
            )
        if order.names.uris and Capability.URI_NAMES not in can:
            raise UnsupportedOperation(
                f"this provider cannot sign certificates with URIs as names, such as {order.names.uris[0]}",
                hint=_OTHER_PROVIDER,
            )
        if order.profile is Profile.PEER and Capability.PEER not in can:
            raise UnsupportedOperation(
                "this provider cannot sign certificates for both ends of a connection", hint=_OTHER_PROVIDER
            )

    def _pause(self, seconds: float) -> None:
        """Wait, without the lock, for a certificate that is pending: others are issued, or all is closed."""
        self._check()
        self._changed.wait(seconds)
        if self._closed:
            raise AuthorityClosed("the authority was closed while the certificate was pending")

    def _revoke(self, one: _Revocable) -> None:
        self._provider.revoke(to_pem([one.leaf]))
        self._issued.pop(fingerprint(one.leaf), None)
        self._observers.tell(EventKind.REVOKED, one.profile, one.leaf, one.names, labels=one.labels)

    def _revoke_all(self) -> None:
        for one in tuple(self._issued.values()):
            try:
                self._revoke(one)
            except CAError as error:
                self._warn(f"the certificate of {one.names[0]} was not revoked: {error.message}")
                if error.retryable:  # the backend is away; asking for the others would only take time
                    break

    def _close_provider(self) -> None:
        try:
            self._provider.close()
        except CAError as error:
            error.provider = None  # the warning is about the provider as it is
            self._warn(str(error))

    def _require_open(self) -> None:
        if self._closed:
            raise AuthorityClosed("the authority is closed", provider=self.provider_name)

    def _warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.append(text)
            import logging  # most authorities have nothing to warn of

            logger = logging.getLogger(__name__)
            logger.warning("ca-provider(%s): %s", self.provider_name, one_line(text, 2000))


def open_authority(
    settings: CASettings | Mapping[str, Any] | None = None,
    *,
    build_id: str | None = None,
    clock: Clock = utc_now,
    environ: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda _: None,
    patient: bool = True,
    labels: Mapping[str, str] | None = None,
    names: str | Iterable[str] = (),
    lifetime: timedelta = DEFAULT_TTL,
) -> Authority:
    """Open the certificate authority that the settings select.

    Args:
        settings: the section ``ca``, validated or as a plain mapping; by default the embedded CA.
        build_id: DNS label that names the build; made up if missing.
        clock: the current time, timezone-aware.
        environ: where secret references look, by default the environment of this process.
        check: called again and again while the provider is waited for; what it raises ends the
            wait.
        report: told in one line what is waited for: by the provider, from a thread of its own, and by the
            framework, for a certificate that is pending.
        patient: whether the provider may try again what fails; see `ProviderContext`.
        labels: for the backend's audit, with every request; see `SignRequest`.
        names: what certificates will be issued for besides the build's own ends, DNS names and URIs: a CA
            that is made for this build alone permits no others.
        lifetime: what will be asked for, if it is known; `Authority.check` compares the backend's limits.

    Returns:
        An open authority; use it in a ``with`` block.

    Raises:
        SettingsError: the settings are wrong.
        IdentityError: build id and name suffix do not make a DNS name, or names or labels are none.
        ProviderLoadError, ProviderNotFound, ProviderConflict: the plugin cannot be used.
        ProviderError: the provider failed while opening.
        MaterialError: the CA's own certificates are not usable.
    """
    if settings is None or settings == {}:
        settings = _defaults(PluginCatalog())
    elif not isinstance(settings, CASettings):
        settings = validate(CASettings, Document({"ca": settings}), at="ca")
    identity = Identity(random_build_id() if build_id is None else build_id, settings.name_suffix)
    context = replace(
        provider_context(settings, clock, os.environ if environ is None else environ),
        report=lambda text: report(f"ca-provider({settings.provider}): {one_line(text)}"),
        patient=patient,
        domain=identity.server,
        names=tuple(
            name for one in ((names,) if isinstance(names, str) else names) for name in Names.of(one).all
        ),
        lifetime=lifetime,
    )
    return Authority(settings, identity, context, check, checked_labels(labels or {}))


@lru_cache(maxsize=1)
def _defaults(catalog: PluginCatalog) -> CASettings:
    return validate(CASettings, Document({}), at="ca", context={"catalog": catalog})


# --- observers ------------------------------------------------------------------------------------

OBSERVER_LIMIT = timedelta(seconds=10)
"""How long an observer is waited for."""


class Listener:
    """An observer with its settings, in a thread of its own.

    Args:
        observer: the plugin.
        settings: its block in the configuration.
    """

    def __init__(self, observer: Observer, settings: BaseModel | None) -> None:
        self.name = observer.name
        self._notify = observer.notify
        self._settings = settings
        self._worker = Worker(f"ca-observer({observer.name})", OBSERVER_LIMIT, lambda: None)

    def hear(self, event: CAEvent) -> None:
        """Hand over an event.

        Raises:
            ProviderError: the observer failed; the message says how.
            Unanswered: it did not end in time.
        """
        self._worker.call("noting it", lambda: self._note(event))

    def _note(self, event: CAEvent) -> None:
        try:
            for answer in self._notify(event=event, settings=self._settings):
                crossing.nothing(crossing.not_async(answer))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failure = described(error)
        else:
            return
        raise ProviderError(failure)

    def close(self) -> None:
        """End the thread."""
        self._worker.finish(lambda: None)


@dataclass(frozen=True, slots=True)
class Observers:
    """The observers that the configuration names, and what all their events have in common.

    Args:
        listeners: the observers.
        provider: name of the provider.
        build_id: the build.
        clock: the current time.
        warn: called with one sentence when an observer fails.
    """

    listeners: tuple[Listener, ...]
    provider: str
    build_id: str
    clock: Clock
    warn: Callable[[str], None]

    def tell(
        self,
        kind: EventKind,
        profile: Profile | None = None,
        certificate: x509.Certificate | None = None,
        names: tuple[str, ...] = (),
        *,
        reason: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Hand an event to each observer; one that fails does not keep it from the others."""
        if not self.listeners:
            return
        now, labels = self.clock(), dict(labels or {})
        event = CAEvent(kind, now, self.provider, self.build_id, profile, names, reason=reason, labels=labels)
        if certificate is not None:
            event = replace(
                event,
                serial=f"{serial_of(certificate):x}",
                fingerprint_sha256=fingerprint(certificate),
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
                signature_algorithm=signed_with(certificate),
            )
        for listener in self.listeners:
            with self._warning(listener, kind):
                listener.hear(event)

    def close(self) -> None:
        """End the observers' threads."""
        for listener in self.listeners:
            with self._warning(listener, "the end"):
                listener.close()

    @contextmanager
    def _warning(self, listener: Listener, what: str) -> Iterator[None]:
        try:
            yield
        except (ProviderError, Unanswered) as error:
            self.warn(f'the observer "{listener.name}" failed on "{what}": {error}')
