"""Renders the events of a build as plain lines or as JSON lines; `live` does so on a terminal.

What the guest writes goes into a pipe byte for byte; on a terminal it can't do more than be read. The
renderers add lines of their own between its lines, which may quote untrusted text, too.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from firebuild_bootstrap.errors import OutputError
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    GuestConnected,
    ImageStored,
    Notice,
    PeerRefused,
    PhaseStarted,
    StepCached,
    StepFinished,
    StepOutput,
    StepStarted,
    StreamStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.sizes import human_size
from firebuild_bootstrap.terminal import SafeOutput, json_text
from firebuild_bootstrap.turns import InTurn
from firebuild_pki.display import block, one_line
from firebuild_pki.values import dataclass

BOLD, DIM, RED, GREEN, YELLOW = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 33))
"""Styles of `LineRenderer.line`, ECMA-48 8.3.117."""

LONG_SECONDS: Final = 1.0
"""Tasks that take longer than this are shown for good."""

_TICK_SECONDS: Final = 0.2
PHASES: Final = {
    1: "reading the Dockerfile, the build context and the base",
    2: "issuing certificates",
    3: "starting the bootstrap server",
    4: "writing the metadata",
    5: "starting the machine",
    6: "waiting for the guest",
    7: "storing the image",
}
"""What a phase is while it lasts; `phase-started` has its name."""

_MESSAGE_LIMIT: Final = 4000


class Renderer(Protocol):
    """The consumer of a build's events, which an `EventBus` serialises.

    `shows_failed_output`: what a failed step wrote is the last that it shows.
    """

    shows_failed_output: bool

    def __call__(self, event: Event) -> None:
        """Show one event."""
        ...

    def pause(self) -> None:
        """Show nothing until `resume`: somebody else has the terminal."""
        ...

    def resume(self) -> None:
        """Show what has happened since `pause`, and go on."""
        ...

    def close(self) -> None:
        """Finish the last line; nothing is shown afterwards."""
        ...

    def abandon(self) -> None:
        """Leave the terminal in order, in a signal handler right before the process ends."""
        ...


def human_time(seconds: float) -> str:
    """Write a time for a clock that runs: `59s`, `1m05s`, `2h00m`."""
    whole = max(int(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole // 60 % 60:02}m"


class JsonRenderer:
    """One event a line, in the schema of `firebuild_bootstrap.events`."""

    shows_failed_output = False

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self(StreamStarted())

    def __call__(self, event: Event) -> None:
        """Write the event as one line of JSON."""
        self._out.write(json_text(event.as_json()).encode() + b"\n")
        self._out.flush()

    def pause(self) -> None:
        """Nothing to do: lines of JSON share a terminal with nothing."""

    def resume(self) -> None:
        """Nothing to do, as in `pause`."""

    def close(self) -> None:
        """Nothing is pending."""

    def abandon(self) -> None:
        """Nothing is in disorder."""


@dataclass(frozen=False)
class Task:
    """One phase or task that goes on."""

    name: str
    began: float
    total: int = 0
    bytes: int = 0
    told: bool = False

    def amount(self) -> str:
        """Say how much of it is done, as far as that is known."""
        if self.bytes and self.total:
            return f"{human_size(self.bytes)} of {human_size(self.total)}"
        return human_size(self.bytes or self.total) if self.bytes or self.total else ""

    def ended(self, seconds: float) -> str:
        """Write the line of a task that has ended."""
        return f"{self.name}: {seconds:.1f}s{f', {human_size(self.bytes)}' if self.bytes else ''}"


class _Work:
    """What goes on: a phase of the build, a step, and the tasks inside them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.changed = clock()
        self.step: StepStarted | None = None
        self.phase: Task | None = None
        self.tasks: dict[int, Task] = {}

    def now(self) -> Task | None:
        """Return the innermost task, or else the phase, unless a step tells enough."""
        if self.tasks:
            return next(reversed(self.tasks.values()))
        return None if self.step else self.phase

    def task(self, name: str, total: int = 0) -> Task:
        """Begin something."""
        self.touch()
        return Task(name, self.changed, total)

    def begin_step(self, event: StepStarted) -> None:
        """Begin a step."""
        self.touch()
        self.step = event

    def touch(self) -> None:
        """Take note that something began or ended right now."""
        self.changed = self._clock()

    def end(self) -> None:
        """Nothing goes on any more."""
        self.step = self.phase = None
        self.tasks.clear()
        self.touch()


class LineRenderer(ABC):
    """What plain lines and the live display have in common: a clock beside the events, lines of our own.

    Args:
        out: where it writes.
        clock: seconds that only ever grow.
        tick: seconds from one look at the clock to the next.
    """

    shows_failed_output = False

    def __init__(self, out: BinaryIO, clock: Callable[[], float], tick: float) -> None:
        self._out = out
        self._clock = clock
        self._lock = threading.RLock()
        self._held: list[Event] | None = None
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, args=(tick,), name="progress", daemon=True)
        self._ticker.start()

    def __call__(self, event: Event) -> None:
        """Show the event, if it is one that people read, in its turn."""
        with self._lock:
            if self._held is None:
                self._receive(event)
            else:
                self._held.append(event)

    def pause(self) -> None:
        """Keep what happens, as much as the sessions let through; the terminal is left in order."""
        with self._lock:
            self._leave()
            self._held = []
            self._out.flush()

    def resume(self) -> None:
        """Show what was kept."""
        with self._lock:
            held, self._held = self._held, None
            for event in held or ():
                self._receive(event)

    def close(self) -> None:
        """Finish what is shown, and show nothing any more."""
        self._closed.set()
        self._ticker.join()
        with self._lock:
            self._end()
            self._out.flush()

    @abstractmethod
    def abandon(self) -> None:
        """Leave the terminal in order, in a signal handler right before the process ends."""

    @abstractmethod
    def _receive(self, event: Event) -> None:
        """Show the event, or keep it for later."""

    @abstractmethod
    def _leave(self) -> None:
        """Put the terminal in order for somebody else."""

    @abstractmethod
    def _end(self) -> None:
        """Finish what is shown."""

    @abstractmethod
    def _on_tick(self) -> None:
        """Show how the time passes."""

    @abstractmethod
    def _line(self, text: str, style: str = "") -> None:
        """Write lines of our own."""

    def _tick(self, seconds: float) -> None:
        # The thread of the next event reports a terminal that has gone.
        with suppress(OSError, OutputError):
            while not self._closed.wait(seconds):
                with self._lock:
                    if self._held is None:
                        self._on_tick()
                        self._out.flush()

    # --- what looks alike -------------------------------------------------------------------------

    def _build_started(self, event: BuildStarted) -> None:
        tag, provider = one_line(event.tag), one_line(event.ca_provider)
        self._line(f"Building {tag} (build {event.build_id}, CA {provider})", BOLD)

    def _notice(self, event: Notice) -> None:
        # A warning may quote untrusted text; instructions to the user may take several lines.
        shown = one_line if event.level == "warning" else block
        message = shown(event.message, _MESSAGE_LIMIT)
        self._line(f"{event.level}: {message}", YELLOW if event.level == "warning" else "")

    def _peer_refused(self, event: PeerRefused) -> None:
        subject, print_ = one_line(event.subject), one_line(event.fingerprint_sha256)
        who = f" (subject {subject}, SHA-256 {print_})" if event.subject else ""
        peer, reason = one_line(event.peer), one_line(event.reason)
        self._line(f"warning: refused a connection from {peer}: {reason}{who}", YELLOW)

    def _stored(self, event: ImageStored, extent: str = "") -> None:
        self._line(f"Built {one_line(event.tag)} in {event.seconds:.1f}s{extent}", GREEN)
        self._line(f"  image   {one_line(event.path, _MESSAGE_LIMIT)}")
        self._line(f"  size    {human_size(event.size)}")
        if event.digest:
            self._line(f"  digest  {one_line(event.digest)}")


class PlainRenderer(LineRenderer):
    """Plain lines: a header per step, its output as it came, how long it took, and what else takes long.

    Args:
        out: where it writes.
        screen: what makes the output of steps harmless, where `out` is a terminal.
        clock: seconds that only ever grow.
        directory: where output waits for its turn; None is where temporary files are.
    """

    def __init__(
        self,
        out: BinaryIO,
        *,
        screen: SafeOutput | None = None,
        clock: Callable[[], float] = time.monotonic,
        directory: Path | None = None,
    ) -> None:
        self._screen = screen
        self._work = _Work(clock)
        self._turns = InTurn(self._show, directory)
        self._at_line_start = True
        self._handlers: dict[type[Event], Callable[..., None]] = {
            BuildStarted: self._build_started,
            PhaseStarted: self._phase_started,
            TaskStarted: self._task_started,
            TaskProgress: self._task_progress,
            TaskFinished: self._task_finished,
            GuestConnected: lambda _: self._end_phase(),
            StepStarted: self._step_started,
            StepCached: self._step_cached,
            StepOutput: self._step_output,
            StepFinished: self._step_finished,
            Notice: self._notice,
            PeerRefused: self._peer_refused,
            ImageStored: self._image_stored,
            BuildFailed: self._build_failed,
        }
        super().__init__(out, clock, _TICK_SECONDS)

    def abandon(self) -> None:
        """Nothing is in disorder."""

    def _receive(self, event: Event) -> None:
        self._turns(event)

    def _show(self, event: Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)
            self._out.flush()

    def _leave(self) -> None:
        self._end_output()
        self._fresh_line()

    def _end(self) -> None:
        self._turns.close()
        self._work.end()
        self._leave()

    # --- how it is written ------------------------------------------------------------------------

    def _line(self, text: str, style: str = "") -> None:  # noqa: ARG002 - the live display has styles
        self._fresh_line()
        self._out.write(text.encode(errors="replace") + b"\n")

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            self._write(b"\n")

    def _write(self, data: bytes) -> None:
        """Write output of the guest."""
        if data:
            self._out.write(data)
            self._at_line_start = data.endswith(b"\n")

    def _on_tick(self) -> None:
        task = self._work.now()
        if task is None or task.told:
            return
        if self._clock() - max(task.began, self._work.changed) >= LONG_SECONDS:
            task.told = True
            amount = f" ({human_size(task.total)})" if task.total else ""
            self._line(f"{task.name}{amount} …", DIM)

    # --- phases and tasks -------------------------------------------------------------------------

    def _phase_started(self, event: PhaseStarted) -> None:
        self._end_phase()
        self._work.phase = self._work.task(PHASES.get(event.phase, one_line(event.name)))

    def _end_phase(self) -> None:
        phase, self._work.phase = self._work.phase, None
        if phase is not None:
            self._task_took(phase, self._clock() - max(phase.began, self._work.changed))
        self._work.touch()

    def _task_started(self, event: TaskStarted) -> None:
        self._work.tasks[event.task] = self._work.task(one_line(event.name), event.total_bytes)

    def _task_progress(self, event: TaskProgress) -> None:
        if event.task in self._work.tasks:
            self._work.tasks[event.task].bytes = event.bytes

    def _task_finished(self, event: TaskFinished) -> None:
        task = self._work.tasks.pop(event.task, None)
        if task is not None:
            task.bytes = event.bytes or task.total
            self._task_took(task, event.seconds)
        self._work.touch()

    def _task_took(self, task: Task, seconds: float) -> None:
        if task.told or seconds >= LONG_SECONDS:
            self._line(task.ended(seconds), DIM)

    # --- steps ------------------------------------------------------------------------------------

    def _step_started(self, event: StepStarted) -> None:
        self._end_output()
        self._end_phase()
        self._work.begin_step(event)
        self._line(header(event), BOLD)

    def _step_cached(self, event: StepCached) -> None:
        self._line(f"{header(event)}  {origin_of(event)}", DIM)

    def _step_output(self, event: StepOutput) -> None:
        if self._screen is None:
            self._write(event.data)
        else:
            self._write(self._screen.feed(event.stream, event.data).encode(errors="replace"))

    def _end_output(self) -> None:
        """Show what was held back of a step's output, and end its colours."""
        if self._screen is not None:
            self._write(self._screen.finish().encode(errors="replace"))

    def _step_finished(self, event: StepFinished) -> None:
        self._end_output()
        self._step_took(event, self._work.step if self._is_current(event) else None)
        if self._is_current(event):
            self._work.step = None
            self._work.touch()

    def _is_current(self, event: StepFinished) -> bool:
        return self._work.step is not None and self._work.step.step == event.step

    def _step_took(self, event: StepFinished, started: StepStarted | None) -> None:
        number = f"{number_of(started)} " if started else ""
        if event.exit_code:
            self._line(f"{number}failed after {event.seconds:.1f}s, exit code {event.exit_code}", RED)
        else:
            self._line(f"{number}done in {event.seconds:.1f}s", DIM)

    # --- what else happens ------------------------------------------------------------------------

    def _image_stored(self, event: ImageStored) -> None:
        self._work.end()
        self._stored(event)

    def _build_failed(self, _: BuildFailed) -> None:
        """The error itself goes to standard error; what goes on from now on is the clean-up."""
        self._end_output()
        self._fresh_line()
        self._work.end()
        self._work.phase = self._work.task("cleaning up")


def header(event: StepStarted | StepCached) -> str:
    """Write the first line of a step."""
    return f"{number_of(event)} {one_line(event.instruction)}"


def number_of(event: StepStarted | StepCached) -> str:
    """Write which step of which stage it is."""
    stage = f"{one_line(event.stage)} " if event.stage else ""
    return f"[{stage}{event.step}/{event.total}]"


def origin_of(event: StepCached) -> str:
    """Say that a step is not executed, and who has its result from where."""
    return f"CACHED from {one_line(event.origin, 100)}" if event.origin else "CACHED"
