"""Renders the events of a build: live on a terminal, as plain lines in a pipe, or as JSON lines.

What the guest writes goes into a pipe byte for byte; on a terminal it can't do more than be read. The
renderers add lines of their own between its lines, which may quote untrusted text, too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final, Literal, Protocol

from firebuild_bootstrap.errors import OutputError
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    EventSink,
    GuestConnected,
    ImageStored,
    Notice,
    PeerRefused,
    PhaseStarted,
    StageFinished,
    StageStarted,
    StepCached,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.sizes import human_size
from firebuild_bootstrap.terminal import SafeOutput, Screen, cells, colours_wanted, fit, is_dumb, json_text
from firebuild_pki.display import block, one_line

ProgressMode = Literal["auto", "plain", "rawjson"]

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _RESET = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 0))
_TICK_SECONDS: Final = 0.2
# Tasks that take longer than this are shown.
_LONG_SECONDS: Final = 1.0
# What a phase is while it lasts; `phase-started` has its name.
_PHASES: Final = {
    1: "reading the Dockerfile, the build context and the base",
    2: "issuing certificates",
    3: "starting the bootstrap server",
    4: "writing the metadata",
    5: "starting the machine",
    6: "waiting for the guest",
    7: "storing the image",
}
_MESSAGE_LIMIT: Final = 4000


class Renderer(Protocol):
    """The consumer of a build's events, which an `EventBus` serialises."""

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


def make_renderer(
    mode: ProgressMode, out: BinaryIO, *, terminal: bool, environ: Mapping[str, str] | None = None
) -> Renderer:
    """Choose the renderer: `auto` is live on a terminal and plain elsewhere.

    Args:
        out: where it writes.
        terminal: whether that is a terminal; one that is dumb (TERM) gets plain lines.
        environ: the environment, of which NO_COLOR and TERM count.
    """
    known = os.environ if environ is None else environ
    if mode == "rawjson":
        return JsonRenderer(out)
    if mode == "auto" and terminal and not is_dumb(known):
        return TerminalRenderer(out, colours=colours_wanted(known))
    return PlainRenderer(out, screen=SafeOutput(colours=not is_dumb(known)) if terminal else None)


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

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def __call__(self, event: Event) -> None:
        """Write the event as one line of JSON."""
        self._out.write(json_text(event.as_json()).encode() + b"\n")
        self._out.flush()

    def pause(self) -> None:
        """Go on: lines of JSON do not share a terminal with anybody."""

    def resume(self) -> None:
        """Go on."""

    def close(self) -> None:
        """Nothing is pending."""

    def abandon(self) -> None:
        """Nothing is in disorder."""


@dataclass
class _Task:
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


class _Work:
    """What goes on: a phase of the build, a step, and the tasks inside them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.began = self.changed = self.step_began = clock()
        self.step: StepStarted | None = None
        self.step_bytes = 0
        self.phase: _Task | None = None
        self.tasks: dict[int, _Task] = {}

    def now(self) -> _Task | None:
        """Return the innermost task, or else the phase, unless a step tells enough."""
        if self.tasks:
            return next(reversed(self.tasks.values()))
        return None if self.step else self.phase

    def task(self, name: str, total: int = 0) -> _Task:
        """Begin something."""
        self.touch()
        return _Task(name, self.changed, total)

    def begin_step(self, event: StepStarted) -> None:
        """Begin a step."""
        self.touch()
        self.step, self.step_began, self.step_bytes = event, self.changed, 0

    def touch(self) -> None:
        """Take note that something began or ended right now."""
        self.changed = self._clock()

    def end(self) -> None:
        """Nothing goes on any more."""
        self.step = self.phase = None
        self.tasks.clear()
        self.touch()


class _InTurn:
    """Shows stages that run side by side one after the other, so that their lines do not mix.

    What happens in the stage that began first passes as it comes; the others wait for its end. How much they
    keep is bounded by the limit for the output of each session.

    Args:
        sink: where the events go.
    """

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._stage_of: dict[int, int] = {}
        self._waiting: dict[int, list[Event]] = {}
        self._shown: int | None = None

    def __call__(self, event: Event) -> None:
        """Pass an event on, now or when it is its stage's turn."""
        match event:
            case StageStarted():
                self._waiting[event.step] = []
                self._sink_next()
            case StepStarted():
                self._stage_of[event.step] = self._newest(event.step)
            case BuildFailed():
                self._show(self._stage_of.get(event.step))
        stage = self._stage(event)
        if stage is None or stage == self._shown or stage not in self._waiting:
            self._sink(event)
        else:
            self._waiting[stage].append(event)
        if isinstance(event, StageFinished) and stage is not None and stage == self._shown:
            del self._waiting[stage]
            self._shown = None
            self._sink_next()

    def _newest(self, step: int) -> int:
        """Return the stage that a step belongs to: numbers of steps go through all stages in their order."""
        return max((stage for stage in self._waiting if stage <= step), default=0)

    def _stage(self, event: Event) -> int | None:
        if isinstance(event, StageStarted | StageFinished):
            return event.step
        if isinstance(event, StepStarted | StepOutput | StepProgress | StepFinished):
            return self._stage_of.get(event.step)
        return None

    def _sink_next(self) -> None:
        """Show what the next stage has done so far; one that has ended meanwhile gives way to the next."""
        while self._shown is None and self._waiting:
            stage = next(iter(self._waiting))
            events, self._waiting[stage] = self._waiting[stage], []
            for event in events:
                self._sink(event)
            if any(isinstance(event, StageFinished) for event in events):
                del self._waiting[stage]
            else:
                self._shown = stage

    def _show(self, stage: int | None) -> None:
        """Show what a stage has done, out of its turn, because it has failed."""
        if stage is not None and stage != self._shown:
            for event in self._waiting.pop(stage, []):
                self._sink(event)


class PlainRenderer:
    """Plain lines: a header per step, its output as it came, how long it took, and what else takes long.

    Args:
        out: where it writes.
        screen: what makes the output of steps harmless, where `out` is a terminal.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        out: BinaryIO,
        *,
        screen: SafeOutput | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = out
        self._screen = screen
        self._clock = clock
        self._work = _Work(clock)
        self._lock = threading.RLock()
        self._turns = _InTurn(self._show)
        self._at_line_start = True
        self._held: list[Event] | None = None
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
            StepProgress: self._step_progress,
            StepFinished: self._step_finished,
            Notice: self._notice,
            PeerRefused: self._peer_refused,
            ImageStored: self._image_stored,
            BuildFailed: self._build_failed,
        }
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._ticker.start()

    def __call__(self, event: Event) -> None:
        """Show the event, if it is one that people read, in its turn."""
        with self._lock:
            if self._held is None:
                self._turns(event)
            else:
                self._held.append(event)

    def pause(self) -> None:
        """Keep what happens, as much as the sessions let through; the terminal is left in order."""
        with self._lock:
            self._end_output()
            self._fresh_line()
            self._held = []
            self._hide()
            self._out.flush()

    def resume(self) -> None:
        """Show what was kept."""
        with self._lock:
            held, self._held = self._held, None
            for event in held or ():
                self._turns(event)

    def _hide(self) -> None:
        """Remove what stands for what goes on."""

    def _show(self, event: Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)
            self._refresh()
            self._out.flush()

    def close(self) -> None:
        """End an unfinished line of output."""
        self._closed.set()
        self._ticker.join()
        with self._lock:
            self._end_output()
            self._work.end()
            self._fresh_line()
            self._refresh()
            self._out.flush()

    def abandon(self) -> None:
        """Nothing is in disorder."""

    # --- how it is written ------------------------------------------------------------------------

    def _line(self, text: str, style: str = "") -> None:  # noqa: ARG002 - the terminal has styles
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

    def _refresh(self) -> None:
        """Show what goes on."""

    def _tick(self) -> None:
        # The thread of the next event reports a terminal that has gone.
        with suppress(OSError, OutputError):
            while not self._closed.wait(_TICK_SECONDS):
                with self._lock:
                    if self._held is None:
                        self._on_tick()
                        self._out.flush()

    def _on_tick(self) -> None:
        task = self._work.now()
        if task is None or task.told:
            return
        if self._clock() - max(task.began, self._work.changed) >= _LONG_SECONDS:
            task.told = True
            amount = f" ({human_size(task.total)})" if task.total else ""
            self._line(f"{task.name}{amount} …", _DIM)

    # --- phases and tasks -------------------------------------------------------------------------

    def _build_started(self, event: BuildStarted) -> None:
        tag, provider = one_line(event.tag), one_line(event.ca_provider)
        self._line(f"Building {tag} (build {event.build_id}, CA {provider})", _BOLD)

    def _phase_started(self, event: PhaseStarted) -> None:
        self._end_phase()
        self._work.phase = self._work.task(_PHASES.get(event.phase, one_line(event.name)))

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
            task.total = 0
            self._task_took(task, event.seconds)
        self._work.touch()

    def _task_took(self, task: _Task, seconds: float) -> None:
        if task.told or seconds >= _LONG_SECONDS:
            self._line(
                ", ".join(part for part in (f"{task.name}: {seconds:.1f}s", task.amount()) if part), _DIM
            )

    # --- steps ------------------------------------------------------------------------------------

    def _step_started(self, event: StepStarted) -> None:
        self._end_output()
        self._end_phase()
        self._work.begin_step(event)
        self._show_header()

    def _step_cached(self, event: StepCached) -> None:
        origin = f" from {one_line(event.origin, 100)}" if event.origin else ""
        self._line(f"{_header(event)}  CACHED{origin}", _DIM)

    def _show_header(self) -> None:
        if self._work.step is not None:
            self._line(_header(self._work.step), _BOLD)

    def _step_progress(self, event: StepProgress) -> None:
        if self._work.step is not None and self._work.step.step == event.step:
            self._work.step_bytes = event.bytes

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
        number = f"[{_of_stage(started)}{event.step}/{started.total}] " if started else ""
        if event.exit_code:
            self._line(f"{number}failed after {event.seconds:.1f}s, exit code {event.exit_code}", _RED)
        else:
            self._line(f"{number}done in {event.seconds:.1f}s", _DIM)

    # --- what else happens ------------------------------------------------------------------------

    def _notice(self, event: Notice) -> None:
        # A warning may quote untrusted text; instructions to the user may take several lines.
        shown = one_line if event.level == "warning" else block
        message = shown(event.message, _MESSAGE_LIMIT)
        self._line(f"{event.level}: {message}", _YELLOW if event.level == "warning" else "")

    def _peer_refused(self, event: PeerRefused) -> None:
        subject, print_ = one_line(event.subject), one_line(event.fingerprint_sha256)
        who = f" (subject {subject}, SHA-256 {print_})" if event.subject else ""
        peer, reason = one_line(event.peer), one_line(event.reason)
        self._line(f"warning: refused a connection from {peer}: {reason}{who}", _YELLOW)

    def _image_stored(self, event: ImageStored) -> None:
        self._work.end()
        self._line(f"Built {one_line(event.tag)} in {event.seconds:.1f}s", _GREEN)
        self._line(f"  image   {one_line(event.path, _MESSAGE_LIMIT)}")
        self._line(f"  size    {human_size(event.size)}")
        if event.digest:
            self._line(f"  digest  {one_line(event.digest)}")

    def _build_failed(self, _: BuildFailed) -> None:
        """The error itself goes to standard error; what goes on from now on is the clean-up."""
        self._end_output()
        self._fresh_line()
        self._work.end()
        self._work.phase = self._work.task("cleaning up")


def _header(event: StepStarted | StepCached) -> str:
    return f"[{_of_stage(event)}{event.step}/{event.total}] {one_line(event.instruction)}"


def _of_stage(event: StepStarted | StepCached) -> str:
    return f"{one_line(event.stage)} " if event.stage else ""


class TerminalRenderer(PlainRenderer):
    """Colours, and a live line at the bottom: what goes on, for how long, and how long the build runs.

    A step without output stays on one line. A terminal may change its size at any time.

    Args:
        out: the terminal.
        colours: whether its own lines have colours; those of the guest's output pass in any case.
        clock: seconds that only ever grow.
        size: returns columns and rows; those of `out` by default.
    """

    def __init__(
        self,
        out: BinaryIO,
        *,
        colours: bool = True,
        clock: Callable[[], float] = time.monotonic,
        size: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._colours = colours
        self._terminal = Screen(out, size)
        self._header_shown = True
        super().__init__(out, screen=SafeOutput(), clock=clock)

    def abandon(self) -> None:
        """Remove the live line."""
        self._terminal.abandon()

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if style and self._colours else text

    def _line(self, text: str, style: str = "") -> None:
        self._show_header()
        self._terminal.write_line("\n".join(self._styled(line, style) for line in text.split("\n")))

    def _fresh_line(self) -> None:
        self._terminal.write(self._terminal.end_of_line())

    def _write(self, data: bytes) -> None:
        if data:
            self._show_header()
            self._terminal.write(data.decode())

    def _refresh(self) -> None:
        self._terminal.live(self._live_line())

    def _hide(self) -> None:
        self._terminal.live("")

    def _on_tick(self) -> None:
        self._refresh()

    def _live_line(self) -> str:
        work = self._work
        task, step = work.now(), work.step
        if task is None and step is None:
            return ""
        since = work.step_began if step else task.began if task else work.began
        seconds = self._clock() - since
        if step is None and seconds < _TICK_SECONDS:
            return ""  # most phases are over before anyone could read of them
        doing = [part for part in (task.name if step else "", task.amount()) if part] if task else []
        if step and work.step_bytes:
            doing.append(human_size(work.step_bytes))
        clock, total = human_time(seconds), f"total {human_time(self._clock() - work.began)}"
        room = self._terminal.columns
        # A small terminal keeps room for what goes on.
        tails = ("  " + ", ".join(parts) for parts in ((*doing, clock, total), (*doing, clock), (clock,)))
        tail = next((text for text in tails if cells(text) <= room * 2 // 3), "")
        head = fit(_header(step) if step else task.name if task else "", room - cells(tail))
        return head + self._styled(tail, _DIM)

    def _step_started(self, event: StepStarted) -> None:
        self._header_shown = True
        super()._step_started(event)
        self._header_shown = False

    def _show_header(self) -> None:
        """Write the header of a step once there is something to write below it."""
        if not self._header_shown and self._work.step is not None:
            self._header_shown = True
            header = fit(_header(self._work.step), self._terminal.columns)
            self._terminal.write_line(self._styled(header, _BOLD))

    def _task_took(self, task: _Task, seconds: float) -> None:
        if self._work.step is None and seconds >= _LONG_SECONDS:  # the time of a step says it all
            super()._task_took(task, seconds)

    def _step_took(self, event: StepFinished, started: StepStarted | None) -> None:
        if self._header_shown or event.exit_code or started is None:
            super()._step_took(event, started)
            return
        self._header_shown = True
        tail = f"  {event.seconds:.1f}s"
        head = fit(_header(started), self._terminal.columns - len(tail))
        self._terminal.write_line(self._styled(head, _BOLD) + self._styled(tail, _DIM))

    def _build_failed(self, event: BuildFailed) -> None:
        self._show_header()
        super()._build_failed(event)
