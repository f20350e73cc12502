"""Telling observers what an authority did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cryptography import x509

from firebuild_pki.plugins import PluginCatalog
from firebuild_pki.provider import CAEvent, Clock, EventKind, Profile
from firebuild_pki.x509 import fingerprint

Listener = Callable[[CAEvent], None]


def load_observers(catalog: PluginCatalog, names: Iterable[str]) -> dict[str, Listener]:
    """Import observers by name; raises like `PluginCatalog.load_observer`."""
    return {name: catalog.load_observer(name) for name in names}


@dataclass(frozen=True, slots=True)
class Observers:
    """The observers that the configuration names, and what all their events have in common.

    Args:
        listeners: the observers by name.
        provider: name of the provider.
        build_id: the build.
        clock: the current time.
        warn: called with one sentence when an observer fails.
    """

    listeners: dict[str, Listener]
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
        event = CAEvent(kind, self.clock(), self.provider, self.build_id, profile, names, reason=reason)
        if certificate is not None:
            event = replace(
                event,
                serial=f"{certificate.serial_number:x}",
                fingerprint_sha256=fingerprint(certificate),
                not_before=certificate.not_valid_before_utc,
                not_after=certificate.not_valid_after_utc,
            )
        for name, listener in self.listeners.items():
            try:
                listener(event)
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                self.warn(f'the observer "{name}" failed on "{kind}": {failure}')
