"""What the server tells the outside: events one at a time, refused peers, bounded output, a build's end."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal

from firebuild_bootstrap.errors import FirebuildError, InputError, StepFailed
from firebuild_bootstrap.events import Event, EventSink, Notice, PeerRefused, StepOutput
from firebuild_bootstrap.service.tls import NO_CERTIFICATE, PeerCertificate
from firebuild_pki.display import block, counted, error_text, one_line
from firebuild_pki.values import dataclass

logger: Final = logging.getLogger("firebuild.service")
# Of a step that exceeds the limit, its end: where the error stands.
_TAIL_BYTES: Final = 32 * 1024
# A flood of refused peers must not bury the output of the build; all are counted.
_MOST_NAMED: Final = 50


class SerialSink:
    """Passes events on one at a time, whichever thread they come from.

    Args:
        sink: the receiver.
        on_failure: told once about the first error of the receiver; later events are dropped.
        at_work: entered while an event is with the receiver, which may keep it for long: it may write to a
            pager, or to a terminal that the user has stopped.
    """

    def __init__(
        self,
        sink: EventSink,
        on_failure: Callable[[FirebuildError], None],
        at_work: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._sink = sink
        self._on_failure = on_failure
        self._at_work = at_work
        self._lock = threading.RLock()
        self._broken = False

    def __call__(self, event: Event) -> None:
        """Pass one event on; raises nothing but the KeyboardInterrupt of a Ctrl-C."""
        with self._lock:
            if self._broken:
                return
            try:
                with self._at_work():
                    self._sink(event)
                return
            except BaseException as error:  # a sink is foreign code, and may raise a CancelledError
                # Ctrl-C is for the main thread; gRPC would take one of its own threads' for a lost call.
                main = threading.current_thread() is threading.main_thread()
                if isinstance(error, KeyboardInterrupt) and main:
                    raise
                self._broken = True
                failed = FirebuildError(f"the receiver of the build's events failed: {error_text(error)}")
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
        """Log one refusal and pass it on as an event; only count it once there were too many."""
        with self._lock:
            self._count += 1
            self._last_reason = reason
            count = self._count
        if count > _MOST_NAMED:
            if count == _MOST_NAMED + 1:
                message = f"{_MOST_NAMED} peers were refused; further ones are counted, not named"
                self._events(Notice(level="warning", message=message))
            return
        logger.warning(
            "refused peer %s: %s (subject %s, SHA-256 %s)",
            one_line(peer),
            one_line(reason),
            one_line(certificate.subject) or "none",
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
    """Passes the output of each step on until a limit; of what comes after it, the end is passed on last.

    Args:
        events: receives the output.
        max_bytes: how much of one step is passed on as it comes.
    """

    def __init__(self, events: EventSink, max_bytes: int) -> None:
        self._events = events
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # a failing receiver ends the build, which calls `finish`
        self._rooms: dict[int, int] = {}
        self._step = 0
        self._held: deque[tuple[Literal["stdout", "stderr"], bytes]] = deque()
        self._held_bytes = 0
        self._dropped = 0

    def write(self, step: int, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Pass one piece on, or as much of it as the limit leaves."""
        with self._lock:
            if step != self._step:
                self.finish()
                self._step = step
            room = self._rooms.get(step, self._max_bytes)
            piece, rest = data[:room], data[room:]
            self._rooms[step] = room - len(piece)
            if piece:
                self._events(StepOutput(step=step, stream=stream, data=piece))
            if rest:
                self._hold(stream, rest)

    def finish(self) -> None:
        """Pass the end of what exceeded the limit on, after a word about what is missing before it."""
        with self._lock:
            held, dropped = self._held, self._dropped
            self._held, self._held_bytes, self._dropped = deque(), 0, 0
            if dropped:
                self._events(
                    Notice(
                        level="warning",
                        message=f"step {self._step} wrote more than {counted(self._max_bytes, 'byte')}: "
                        f"{counted(dropped, 'byte')} are left out here (bootstrap.log_limit)",
                        step=self._step,
                    )
                )
            for stream, data in held:
                self._events(StepOutput(step=self._step, stream=stream, data=data))

    def _hold(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        kept = data[-_TAIL_BYTES:]
        self._dropped += len(data) - len(kept)
        self._held.append((stream, kept))
        self._held_bytes += len(kept)
        while self._held_bytes > _TAIL_BYTES:
            stream, oldest = self._held.popleft()
            excess = min(self._held_bytes - _TAIL_BYTES, len(oldest))
            self._held_bytes -= excess
            self._dropped += excess
            if excess < len(oldest):
                self._held.appendleft((stream, oldest[excess:]))


# --- how a build ended ----------------------------------------------------------------------------

_MAX_STATUS: Final = 255
_MAX_REASON: Final = 4000  # characters of what a guest says about its failure


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a build.

    Args:
        error: what to raise for it, whose class tells the kind of end; None on success only.
        step: number of the step that failed, 0 where none was running.
        exit_code: exit status of a failed RUN, else None.
        reason: why the guest gave up: `command`, `file`, `protocol` or `internal`; empty from old guests.
    """

    error: FirebuildError | None = None
    step: int = 0
    exit_code: int | None = None
    reason: str = ""

    @property
    def message(self) -> str:
        """What happened, as a message; empty on success."""
        return self.error.message if self.error else ""

    def raise_for_failure(self) -> None:
        """Raise the error of an unsuccessful end.

        Raises:
            FirebuildError: its subclass tells the ending.
        """
        if self.error is not None:
            raise self.error


def aborted(text: str, *, step: int, exit_code: int, reason: str) -> Outcome:
    """Return the end of a build that its guest has given up.

    Args:
        text: why, in its words.
        step: number of the step, 0 between steps.
        exit_code: exit status of its command; of other failures it means nothing.
        reason: see `Outcome`.

    Raises:
        InputError: no command ends with such a status.
    """
    check_status(step, exit_code)
    status = exit_code if reason == "command" else None
    error = StepFailed(why(text), step=step, exit_code=status)
    return Outcome(error=error, step=step, exit_code=status, reason=reason)


def why(text: str) -> str:
    """Return what a guest says of its failure, as it may be shown."""
    return block(text, _MAX_REASON) or "the guest gave no reason"


def check_status(step: int, exit_code: int) -> None:
    """Refuse what a guest says of the end of a command if no command ends so.

    Raises:
        InputError: it is not from 0 to 255.
    """
    if not 0 <= exit_code <= _MAX_STATUS:
        raise InputError(f"the guest says that step {step} ended with status {exit_code}")


def failure(error: FirebuildError) -> Outcome:
    """Return the outcome that belongs to an error which the guest did not report itself."""
    return Outcome(error=error, step=getattr(error, "step", 0))
