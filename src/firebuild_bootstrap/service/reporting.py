"""What the server tells the outside: events one at a time, refused peers, bounded output."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, Literal

from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.events import Event, EventSink, Notice, PeerRefused, StepOutput
from firebuild_bootstrap.service.certificates import NO_CERTIFICATE, PeerCertificate

logger: Final = logging.getLogger("firebuild.service")


class SerialSink:
    """Passes events on one at a time, whichever thread they come from.

    Args:
        sink: the receiver.
        on_failure: told once about the first error of the receiver; later events are dropped.
    """

    def __init__(self, sink: EventSink, on_failure: Callable[[FirebuildError], None]) -> None:
        self._sink = sink
        self._on_failure = on_failure
        self._lock = threading.RLock()
        self._broken = False

    def __call__(self, event: Event) -> None:
        """Pass one event on; never raises."""
        with self._lock:
            if self._broken:
                return
            try:
                self._sink(event)
                return
            except Exception as error:
                self._broken = True
                failed = FirebuildError(f"the receiver of the build's events failed: {error!r:.200}")
                failed.__cause__ = error
        self._on_failure(failed)


class Refusals:
    """Names and counts every peer that was turned away."""

    def __init__(self, events: EventSink) -> None:
        self._events = events
        self._lock = threading.Lock()
        self._count = 0
        self._last_reason = ""

    def refuse(self, peer: str, reason: str, certificate: PeerCertificate = NO_CERTIFICATE) -> None:
        """Log one refusal and pass it on as an event."""
        with self._lock:
            self._count += 1
            self._last_reason = reason
        logger.warning(
            "refused peer %s: %s (subject %s, SHA-256 %s)",
            peer,
            reason,
            certificate.subject or "none",
            certificate.fingerprint or "none",
        )
        self._events(
            PeerRefused(
                peer=peer,
                reason=reason,
                subject=certificate.subject,
                fingerprint_sha256=certificate.fingerprint,
            )
        )

    @property
    def count(self) -> int:
        """How many peers were refused so far."""
        return self._count

    def summary(self) -> str:
        """Say how many peers were refused and why the last one was."""
        with self._lock:
            if not self._count:
                return "no other peer called either"
            peers = "1 peer was refused" if self._count == 1 else f"{self._count} peers were refused"
            return f"{peers}, the last one because {self._last_reason}"


class BoundedOutput:
    """Passes the output of steps on until a limit, then counts what it drops."""

    def __init__(self, events: EventSink, max_bytes: int) -> None:
        self._events = events
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # a failing receiver ends the build, which calls `finish`
        self._passed = 0
        self._dropped = 0

    def write(self, step: int, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Pass one piece on, or as much of it as the limit leaves."""
        with self._lock:
            piece = data[: self._max_bytes - self._passed]
            self._passed += len(piece)
            self._dropped += len(data) - len(piece)
            if piece:
                self._events(StepOutput(step=step, stream=stream, data=piece))

    def finish(self) -> None:
        """Say how much was dropped, if anything was."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._events(
                Notice(
                    level="warning",
                    message=f"the steps wrote more than {self._max_bytes} bytes: "
                    f"the last {dropped} bytes of output were dropped",
                )
            )
