"""The state of one build that all calls share: the first call, signs of life, its steps, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal

from firebuild_bootstrap.errors import FirebuildError, InputError
from firebuild_bootstrap.events import EventSink, GuestConnected, StepFinished, StepInfo, StepStarted
from firebuild_bootstrap.service.limits import Limits, Watch
from firebuild_bootstrap.service.reporting import (
    BoundedOutput,
    Outcome,
    Refusals,
    SerialSink,
    check_status,
    failure,
)
from firebuild_bootstrap.service.tls import WRONG_GUEST, PeerCertificate
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

_PIECE_BYTES: Final = 256 * 1024
_LONGEST: Final = 366 * 24 * 3600.0


class BuildEnded(Exception):
    """A call came after the end of the build."""


@dataclass(frozen=False)
class _Connection:
    """What is known of a connection of the guest."""

    peer: str
    tls_version: str
    group: str = ""
    called: bool = False


class Session:
    """One build as its server sees it. Every method may be called from any thread.

    Args:
        events: receives the events, one at a time.
        limits: the times that are supervised.
        on_guest_connected: called once, before the guest's first call is answered.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        *,
        events: EventSink,
        limits: Limits,
        on_guest_connected: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events = SerialSink(events, self.fail, self._receiving)
        self.refusals = Refusals(self.events)
        self.output = BoundedOutput(self.events, limits.max_log_bytes)
        self._on_guest_connected = on_guest_connected
        self._clock = clock
        self._watch = Watch(limits, clock(), self.refusals.summary)
        self._changed = threading.Condition()
        self._first_call = threading.Lock()
        self._welcomed = False
        self._way = ""
        self._connections: dict[str, _Connection] = {}
        self._outcome: Outcome | None = None
        self._finished = False
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._at_end: list[Callable[[], None]] = []

    @property
    def has_guest(self) -> bool:
        """Whether the guest has called."""
        return self._watch.connected

    # --- calls ----------------------------------------------------------------------------------

    def enter(self, connection: str = "") -> None:
        """Begin an authenticated call; the first one waits until `on_guest_connected` is through.

        Args:
            connection: that it came over, as gRPC names its peer.

        Raises:
            BuildEnded: the build has ended, or ended right now because that callback failed.
        """
        self.touch()
        known = self._calling(connection)
        with self._first_call:
            if not self._welcomed:
                self._welcomed = True
                self._welcome(known)
        self.touch()

    def touch(self) -> None:
        """Take note of a sign of life.

        Raises:
            BuildEnded: the build has ended.
        """
        with self._changed:
            if self._outcome is not None or self._stopped:
                raise BuildEnded
            first = not self._watch.connected
            self._watch.seen(self._clock())
            if first:
                self._changed.notify_all()

    def speaks(self, way: str) -> None:
        """Take note of the way in which the guest talks to this server: it has one, from its first word on.

        In one it could else report the end of what was asked in the other, whose layers never came.

        Raises:
            InputError: it has begun in another way.
        """
        with self._changed:
            self._way = self._way or way
            if self._way != way:
                raise InputError(f"the guest began with {self._way}, and went on with {way}")

    def pass_on(self, step: int, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Pass output of a step on, in pieces: its receiver may be slow, and the end waits for none.

        Raises:
            BuildEnded: the build has ended.
        """
        for offset in range(0, len(data), _PIECE_BYTES):
            self.touch()
            self.output.write(step, stream, data[offset : offset + _PIECE_BYTES])

    def step_started(self, step: int) -> None:
        """Take note of what the guest works on."""
        with self._changed:
            self._watch.step_started(step)

    def pings_every(self, seconds: float) -> None:
        """Take note of a guest that has a ping interval of its own."""
        with self._changed:
            self._watch.pings_every(seconds)
            self._changed.notify_all()

    @contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let no time limit of the build run while a user has a shell; the guest has to be there."""
        began = self._clock()
        with self._changed:
            self._watch.extend(_LONGEST)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._watch.extend(self._clock() - began - _LONGEST)
                self._changed.notify_all()

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        """Let the guest be silent while an event is with its receiver: nobody hears it until then."""
        with self._changed:
            first = self._watch.hold(self._clock())
        try:
            yield
        finally:
            if first:
                with self._changed:
                    self._watch.release(self._clock())
                    self._changed.notify_all()

    def refuse(self, connection: str, certificate: PeerCertificate) -> None:
        """Turn a caller away whose certificate is not the guest's."""
        self.refusals.refuse(self._calling(connection).peer, WRONG_GUEST, certificate)

    def _calling(self, name: str) -> _Connection:
        with self._changed:
            found = self._connections.get(name) or _Connection(name, "unknown")
            found.called = True
            return found

    def _welcome(self, connection: _Connection) -> None:
        self.events(
            GuestConnected(
                peer=connection.peer, tls_version=connection.tls_version, key_exchange=connection.group
            )
        )
        try:
            self._on_guest_connected()
        except FirebuildError as error:
            self.fail(error)
        except Exception as error:
            failed = FirebuildError(f"the first call of the guest could not be handled: {error!r:.200}")
            failed.__cause__ = error
            self.fail(failed)

    # --- connections ----------------------------------------------------------------------------

    def connection_opened(self, name: str, peer: str, tls_version: str) -> None:
        """The guest is connected from `peer`; gRPC calls the connection `name`."""
        with self._changed:
            self._connections[name] = _Connection(peer, tls_version)
            self._watch.opened()
            self._changed.notify_all()

    def keys_agreed(self, name: str, group: str) -> None:
        """The key exchange of a connection took place in this group."""
        with self._changed:
            self._connections[name].group = group

    def connection_closed(self, name: str) -> bool:
        """One of the guest's connections has ended; say whether a call has come over it."""
        with self._changed:
            self._watch.closed(self._clock())
            self._changed.notify_all()
            return self._connections.pop(name).called

    def left(self) -> None:
        """The guest has ended its session without a word; its machine may tell why, so it has a moment."""
        with self._changed:
            self._watch.left(self._clock())
            self._changed.notify_all()

    # --- the end --------------------------------------------------------------------------------

    def end(self, outcome: Outcome) -> None:
        """End the build; only the first end counts."""
        with self._changed:
            if self._outcome is not None or self._stopped:
                return
            self._outcome = outcome
        self.output.finish()
        with self._changed:
            self._finished = True
            self._changed.notify_all()
            actions = list(self._at_end)
        for action in actions:
            action()

    @contextmanager
    def at_end(self, action: Callable[[], None]) -> Iterator[None]:
        """Have `action` called when the build has ended or the server stops, if that is within the block."""
        with self._changed:
            self._at_end.append(action)
            late = self._finished or self._stopped
        if late:
            action()
        try:
            yield
        finally:
            with self._changed:
                self._at_end.remove(action)

    def fail(self, error: FirebuildError) -> None:
        """End the build with an error."""
        self.end(failure(error))

    def wait(self, timeout: float | None) -> Outcome | None:
        """Return the end of the build, or None if it did not come within `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished or self._stopped, timeout)
            return self._outcome if self._finished else None

    # --- supervision ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to supervise the times."""
        self.await_guest()
        thread = threading.Thread(target=self._supervise, name="firebuild-watch", daemon=True)
        thread.start()
        self._thread = thread  # once it runs: `stop` waits for it

    def await_guest(self) -> None:
        """Give the guest the whole initial time from now on."""
        with self._changed:
            self._watch.restart(self._clock())

    def stop(self) -> None:
        """End the supervision; every later call is refused."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            actions = list(self._at_end)
        for action in actions:
            action()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _supervise(self) -> None:
        while True:
            with self._changed:
                if self._outcome is not None or self._stopped:
                    return
                due, error = self._watch.deadline()
                remaining = due - self._clock()
                if remaining > 0:
                    self._changed.wait(remaining)
                    continue
            self.fail(error())


class StepEvents:
    """Tells that steps begin and end, each once. Any thread may call.

    Args:
        session: takes the events.
        steps: what is known about each.
        total: the number of steps, `FROM` included.
        stage: what they belong to, where the build has several.
    """

    def __init__(self, session: Session, steps: Sequence[StepInfo], total: int, stage: str = "") -> None:
        self._session = session
        self._steps = {step.number: step for step in steps}
        self._total = total
        self._stage = stage
        self._left = set(self._steps)
        self._begun: set[int] = set()

    def known(self, number: int) -> int:
        """Return the number of a step that a guest names; 0 is what it says between steps.

        Raises:
            InputError: the build has no such step.
        """
        if number and number not in self._steps:
            raise InputError(f"the guest reports about step {number}, which this build does not have")
        return number

    def started(self, number: int) -> None:
        """A step began; only the first word of it is an event, or a guest could make millions of them."""
        step = self._steps[self.known(number)]
        self._session.step_started(number)
        if number in self._begun:
            return
        self._begun.add(number)
        self._session.events(
            StepStarted(
                step=number,
                total=self._total,
                instruction=step.instruction,
                line=step.line,
                stage=self._stage,
            )
        )

    def finished(self, number: int, exit_code: int, seconds: float) -> None:
        """A step ended, `seconds` after its begin; only the first word of it counts.

        Raises:
            InputError: it can't have ended so.
        """
        check_status(number, exit_code)
        if not 0 <= seconds <= _LONGEST:
            raise InputError(f"the guest says that step {number} took {counted(seconds, 'second')}")
        if number not in self._left:
            return
        self._left.remove(number)
        self._session.output.finish()
        self._session.events(StepFinished(step=number, exit_code=exit_code, seconds=seconds))
