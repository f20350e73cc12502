"""A provider behind glass: time limits, errors that name it, and nothing but what was promised."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

from firebuild_pki.config import CASettings
from firebuild_pki.errors import ProviderError, SettingsError, UnsupportedOperation
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Note,
    Profile,
    ProviderContext,
    ProviderSpec,
    ReadyPair,
    SignedCertificate,
    SignRequest,
    TrustBundle,
    utc_now,
)
from firebuild_pki.worker import Unanswered, Worker
from firebuild_pki.wrapping import provider_errors

ResultT = TypeVar("ResultT")


class GuardedProvider(CAProvider):
    """Passes every call on to a provider, in the provider's own thread.

    Args:
        spec: what the plugin registered.
        settings: the block of the provider.
        context: for the provider.
        limit: how long a call may take.
        check: called again and again while waiting; what it raises ends the wait.

    Raises:
        ProviderError: the factory failed, or made something else than a provider.
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
            self._provider = self._made(spec, settings, context)
            self._capabilities = self._settled(spec.capabilities)
        except BaseException:
            self.discard()
            raise

    def capabilities(self) -> frozenset[Capability]:
        """What the provider can do with its settings: exactly one of SIGN and READY_PAIRS."""
        return self._capabilities

    def validate(self) -> Sequence[Note]:
        """See `CAProvider.validate`."""
        return self._notes("looking at the settings", self._provider.validate)

    def open(self) -> None:
        """See `CAProvider.open`."""
        self._call("opening the provider", self._provider.open)

    def close(self) -> None:
        """Close the provider and end its thread. Any error of the provider is let through as it is."""
        self._worker.finish(self._provider.close)

    def discard(self) -> None:
        """End the thread of a provider that was not opened."""
        self._worker.finish(lambda: None)

    def check(self) -> Sequence[Note]:
        """See `CAProvider.check`."""
        return self._notes("the check", self._provider.check)

    def trust_bundle(self) -> TrustBundle:
        """See `CAProvider.trust_bundle`."""
        return self._call("reading the trust bundle", self._provider.trust_bundle)

    def sign(self, request: SignRequest) -> SignedCertificate:
        """See `CAProvider.sign`."""
        doing = f"issuing the {request.profile} certificate"
        return self._call(doing, lambda: self._provider.sign(request))

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """See `CAProvider.ready_pair`."""
        doing = f"issuing the {profile} certificate"
        return self._call(doing, lambda: self._provider.ready_pair(profile))

    def revoke(self, certificate_pem: bytes) -> None:
        """See `CAProvider.revoke`."""
        if Capability.REVOKE not in self._capabilities:
            raise UnsupportedOperation("this provider cannot revoke certificates", provider=self._name)
        self._call("revoking a certificate", lambda: self._provider.revoke(certificate_pem))

    def _made(self, spec: ProviderSpec, settings: object, context: ProviderContext) -> CAProvider:
        made: object = self._call("making the provider", lambda: spec.factory(settings, context))
        if isinstance(made, CAProvider):
            return made
        message = f"expected its factory to make a CAProvider, found {type(made).__name__}"
        raise ProviderError(message, provider=self._name)

    def _settled(self, promised: frozenset[Capability]) -> frozenset[Capability]:
        said = self._call("asking for the capabilities", self._provider.capabilities)
        found = promised if said is None else said
        if found <= promised and len(found & {Capability.SIGN, Capability.READY_PAIRS}) == 1:
            return found
        raise ProviderError(
            "expected exactly one of the capabilities sign and ready-pairs, among those of its "
            f"ProviderSpec; found: {', '.join(sorted(found)) or 'none'}",
            provider=self._name,
        )

    def _notes(self, doing: str, function: Callable[[], Sequence[object]]) -> tuple[Note, ...]:
        notes = []
        for note in self._call(doing, function) or ():
            if not isinstance(note, Note):
                found = type(note).__name__
                raise ProviderError(f"expected notes of {doing}, found {found}", provider=self._name)
            notes.append(note)
        return tuple(notes)

    def _call(self, doing: str, function: Callable[[], ResultT]) -> ResultT:
        with provider_errors(self._name, doing):
            try:
                return self._worker.call(doing, function)
            except Unanswered as error:
                hint = "look at the backend, or raise ca.call_timeout"
                raise ProviderError(str(error), hint=hint, retryable=True) from None


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
    notes = tuple(provider.validate())
    problems = [settings.problem(note) for note in notes if note.fatal]
    if problems:
        raise SettingsError(problems)
    return notes


def check_settings(settings: CASettings, environ: Mapping[str, str] | None = None) -> tuple[Note, ...]:
    """Let the selected provider look at its settings, without any I/O.

    Args:
        settings: the section ``ca``.
        environ: where secret references would look, by default the environment of this process.

    Returns:
        What the provider remarked.

    Raises:
        SettingsError: it cannot work with these settings.
        ProviderError: the provider failed.
    """
    provider = make_provider(settings, ProviderContext(utc_now, os.environ if environ is None else environ))
    try:
        return settings_notes(settings, provider)
    finally:
        provider.discard()
