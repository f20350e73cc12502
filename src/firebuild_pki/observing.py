"""Telling observers what an authority did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

from cryptography import x509
from pydantic import BaseModel

from firebuild_pki.chain import serial_of
from firebuild_pki.errors import ProviderError
from firebuild_pki.plugins import Observer
from firebuild_pki.provider import CAEvent, Clock, EventKind, Profile
from firebuild_pki.worker import Unanswered, Worker
from firebuild_pki.wrapping import described
from firebuild_pki.x509 import fingerprint

LIMIT = timedelta(seconds=10)
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
        self._worker = Worker(f"ca-observer({observer.name})", LIMIT, lambda: None)

    def hear(self, event: CAEvent) -> None:
        """Hand over an event.

        Raises:
            ProviderError: the observer failed; the message says how.
            Unanswered: it did not end in time.
        """
        self._worker.call("noting it", lambda: self._note(event))

    def _note(self, event: CAEvent) -> None:
        try:
            self._notify(event=event, settings=self._settings)
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
        reason: str | None = None,
    ) -> None:
        """Hand an event to each observer; one that fails does not keep it from the others."""
        if not self.listeners:
            return
        event = CAEvent(kind, self.clock(), self.provider, self.build_id, profile, names, reason=reason)
        if certificate is not None:
            event = replace(
                event,
                serial=f"{serial_of(certificate):x}",
                fingerprint_sha256=fingerprint(certificate),
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
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
