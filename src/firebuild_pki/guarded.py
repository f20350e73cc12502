"""A provider, isolated: time limits, errors that name it, and nothing but what the contract allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final, TypeVar

from firebuild_pki import crossing
from firebuild_pki.config import CASettings
from firebuild_pki.errors import (
    AuthorityClosed,
    CAError,
    ProviderError,
    SettingsError,
    UnsupportedOperation,
)
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Clock,
    Note,
    Profile,
    ProviderContext,
    ProviderSpec,
    ReadyPair,
    RetryAfter,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    utc_now,
)
from firebuild_pki.worker import Forked, Unanswered, Worker
from firebuild_pki.wrapping import as_ca_error

ResultT = TypeVar("ResultT")

_READING: Final = "reading the trust bundle"


class GuardedProvider(CAProvider):
    """Passes every call on to a provider, in the provider's own thread.

    All of a provider's code runs there, and within the limit: also what runs when its answers are read, and
    when its exceptions are put into words.

    Args:
        spec: what the plugin registered.
        settings: the block of the provider.
        context: for the provider.
        limit: how long a call may take.
        check: called again and again while waiting; what it raises ends the wait.

    Raises:
        ProviderError: the factory failed, or made something else than a provider, or `CAProvider.validate`
            failed, which is called along with it.
    """

    def __init__(
        self,
        spec: ProviderSpec,
        settings: object,
        context: ProviderContext,
        *,
        limit: timedelta,
        check: Callable[[], None],
    ) -> None:
        self._name = spec.name
        self._worker = Worker(f"ca-provider({spec.name})", limit, check)
        try:
            self._provider: CAProvider | None = None
            self._capabilities, self._remarks = self._in_time(
                "making the provider", lambda: (self._make(spec, settings, context), self._looked_at())
            )
        except BaseException:
            self.discard()
            raise

    def capabilities(self) -> frozenset[Capability]:
        """What the provider can do with its settings: exactly one of SIGN and READY_PAIRS."""
        return self._capabilities

    def validate(self) -> tuple[Note, ...]:
        """See `CAProvider.validate`."""
        return self._remarks

    def opened(self) -> TrustBundle:
        """Open the provider and return its trust bundle, in one call of its thread; in place of `open`."""
        made = self._made
        doing = "opening the provider"
        opening = self._guarded(doing, made.open, crossing.nothing)
        reading = self._guarded(_READING, made.trust_bundle, crossing.trust_bundle)
        return self._in_time(doing, lambda: (opening(), reading())[1])

    def close(self) -> None:
        """Close the provider, end its thread, and let go of the provider.

        Raises:
            ProviderError: it failed, or did not end in time; the message says that it was about closing.
        """
        provider, self._provider = self._made, None
        try:
            call = self._guarded("closing the provider", provider.close, crossing.nothing)
            self._worker.finish(call)
        except Unanswered as error:
            raise ProviderError(f"closing the provider failed: {error}") from None
        except CAError as error:
            if not error.message.startswith("closing the provider failed"):
                error.message = f"closing the provider failed: {error.message}"
            raise

    def discard(self) -> None:
        """End the thread of a provider that was not opened."""
        self._provider = None
        self._worker.finish(lambda: None)

    def check(self) -> tuple[Note, ...]:
        """See `CAProvider.check`."""
        return self._notes("the check", self._made.check)

    def trust_bundle(self) -> TrustBundle:
        """See `CAProvider.trust_bundle`."""
        return self._call(_READING, self._made.trust_bundle, crossing.trust_bundle)

    def sign(self, request: SignRequest) -> SignedCertificate | RetryAfter:
        """See `CAProvider.sign`."""
        doing = f"issuing the {request.profile} certificate"
        return self._call(doing, lambda: self._made.sign(request), crossing.signing_answer)

    def poll(self, request: SignRequest, handle: str) -> SignedCertificate | RetryAfter:
        """See `CAProvider.poll`."""
        doing = f"asking for the {request.profile} certificate"
        return self._call(doing, lambda: self._made.poll(request, handle), crossing.signing_answer)

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """See `CAProvider.ready_pair`."""
        doing = f"issuing the {profile} certificate"
        return self._call(doing, lambda: self._made.ready_pair(profile), crossing.ready_pair)

    def revoke(self, certificate_pem: bytes) -> None:
        """See `CAProvider.revoke`."""
        if Capability.REVOKE not in self._capabilities:
            raise UnsupportedOperation("this provider cannot revoke certificates", provider=self._name)
        doing = "revoking a certificate"
        self._call(doing, lambda: self._made.revoke(certificate_pem), crossing.nothing)

    @property
    def _made(self) -> CAProvider:
        if self._provider is None:
            raise AuthorityClosed("the provider is closed", provider=self._name)
        return self._provider

    def _make(self, spec: ProviderSpec, settings: object, context: ProviderContext) -> frozenset[Capability]:
        made = self._guarded("making the provider", lambda: spec.factory(settings, context), _provider)()
        self._provider = made
        said = self._guarded("asking for the capabilities", made.capabilities, crossing.capabilities)()
        found = spec.capabilities if said is None else said
        if found <= spec.capabilities and len(found & {Capability.SIGN, Capability.READY_PAIRS}) == 1:
            return found
        raise ProviderError(
            "expected exactly one of the capabilities sign and ready-pairs, among those of its "
            f"ProviderSpec; found: {', '.join(sorted(found)) or 'none'}",
            provider=self._name,
        )

    def _looked_at(self) -> tuple[Note, ...]:
        doing = "looking at the settings"
        return self._guarded(doing, self._made.validate, lambda found: crossing.notes(found, doing))()

    def _notes(self, doing: str, function: Callable[[], object]) -> tuple[Note, ...]:
        return self._call(doing, function, lambda found: crossing.notes(found, doing))

    def _call(
        self, doing: str, function: Callable[[], object], made_ours: Callable[[object], ResultT]
    ) -> ResultT:
        return self._in_time(doing, self._guarded(doing, function, made_ours))

    def _in_time(self, doing: str, call: Callable[[], ResultT]) -> ResultT:
        try:
            return self._worker.call(doing, call)
        except Forked as error:
            hint = "open an authority of its own there"
            raise ProviderError(str(error), provider=self._name, hint=hint) from None
        except Unanswered as error:
            hint = "look at the backend, or raise ca.call_timeout"
            message = str(error)
        raise ProviderError(message, provider=self._name, hint=hint, retryable=True)

    def _guarded(
        self,
        doing: str,
        function: Callable[[], object],
        made_ours: Callable[[object], ResultT],
    ) -> Callable[[], ResultT]:
        """Wrap a call for the provider's thread: what it returns or raises is read there, and made ours."""

        def call() -> ResultT:
            try:
                return made_ours(crossing.not_async(function()))
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                ours = as_ca_error(error, self._name, doing)
            raise ours

        return call


def _provider(made: object) -> CAProvider:
    if isinstance(made, CAProvider):
        return made
    raise ProviderError(f"expected its factory to make a CAProvider, found {type(made).__name__}")


def make_provider(
    settings: CASettings, context: ProviderContext, check: Callable[[], None] = lambda: None
) -> GuardedProvider:
    """Make the provider that the settings select; raises like `GuardedProvider`."""
    limit = settings.call_timeout
    return GuardedProvider(settings.spec, settings.provider_settings, context, limit=limit, check=check)


def settings_notes(settings: CASettings, provider: GuardedProvider) -> tuple[Note, ...]:
    """Let a provider look at its settings.

    Returns:
        What it remarked.

    Raises:
        SettingsError: a remark is fatal; with the position of the setting.
        ProviderError: the provider failed.
    """
    notes = provider.validate()
    problems = [settings.problem(note) for note in notes if note.fatal]
    if problems:
        raise SettingsError(problems)
    return notes


def provider_context(settings: CASettings, clock: Clock, environ: Mapping[str, str]) -> ProviderContext:
    """Return what a provider may use of the world, with all that the settings know of it.

    Args:
        settings: the section ``ca``.
        clock: the current time.
        environ: where secret references are resolved.
    """
    return ProviderContext(
        clock, environ, name_suffix=settings.name_suffix, key_store=settings.catalog.load_key_store
    )


def check_settings(settings: CASettings, environ: Mapping[str, str] | None = None) -> tuple[Note, ...]:
    """Let the selected provider look at its settings, without any I/O.

    Args:
        settings: the section ``ca``.
        environ: where secret references would look, by default the environment of this process.

    Returns:
        What the provider remarked.

    Raises:
        SettingsError: it cannot work with these settings, or the names of builds would be none.
        ProviderError: the provider failed.
    """
    problem = settings.suffix_problem()
    if problem is not None:
        raise SettingsError([problem])
    context = provider_context(settings, utc_now, os.environ if environ is None else environ)
    provider = make_provider(settings, context)
    try:
        return settings_notes(settings, provider)
    finally:
        provider.discard()
