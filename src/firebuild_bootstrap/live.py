"""The live display on a terminal: what is done in lines that stay, below them what goes on in a block.

Stages run side by side, so each running step has a row of its own, with its clock, and below it the last
lines that it wrote. Of a step that has succeeded one line remains. All that a failed one wrote is shown when
the build has ended; until then it waits in a file without a name, so that a step may write a lot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal

from firebuild_bootstrap.errors import ExitStatus
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
    StepProgress,
    StepStarted,
    TaskFinished,
    TaskProgress,
    TaskStarted,
)
from firebuild_bootstrap.progress import (
    BOLD,
    DIM,
    LONG_SECONDS,
    PHASES,
    RED,
    LineRenderer,
    Task,
    header,
    human_time,
    number_of,
    origin_of,
)
from firebuild_bootstrap.sizes import human_size
from firebuild_bootstrap.terminal import SafeOutput, Screen, cells, fit, uncoloured, visible_end
from firebuild_bootstrap.turns import Spool
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_RESET: Final = "\x1b[0m"
_TICK_SECONDS: Final = 0.1
# Output of a step that is shown while it runs.
_LINES: Final = 6
_END_CHARACTERS: Final = 16 * 1024
# Most work is over before anyone could read of it.
_SHORT_SECONDS: Final = 0.2


class Log:
    """All that a step has written, harmless; the service bounds how much that is (`bootstrap.log_limit`).

    Args:
        directory: where it waits; None is where temporary files are.
        colours: SGR sequences are kept.
    """

    def __init__(self, directory: Path | None, *, colours: bool) -> None:
        self._safe = SafeOutput(colours=colours)
        self._spool = Spool(directory)
        self._end = ""
        self._lost = ""

    def __bool__(self) -> bool:
        return bool(self._end)

    def write(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Keep one more piece."""
        self.add(self._safe.feed(stream, data))

    def add(self, text: str) -> None:
        """Keep a harmless text."""
        self._end = (self._end + text)[-_END_CHARACTERS:]
        if not self._lost:
            try:
                self._spool.append(text.encode(errors="replace"))
            except OSError as error:  # a full disk, say, is no reason to end the build
                self._lost = f"(the rest could not be kept: {error.strerror}; this is the end of it)\n"

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines, as they look."""
        return visible_end(self._end, count) if self._end else []

    def pieces(self) -> Iterator[bytes]:
        """Yield all of it, which ends with a newline."""
        self.add(self._safe.finish())
        yield from self._spool.read()
        if self._lost:
            yield f"\n{self._lost}{self._end}".encode(errors="replace")
        if not uncoloured(self._end).endswith("\n"):
            yield b"\n"

    def close(self) -> None:
        """Discard the output that was kept."""
        self._spool.close()


@dataclass(frozen=False)
class _Step:
    """A step that runs, or one that has failed."""

    event: StepStarted
    began: float
    log: Log
    bytes: int = 0
    failure: StepFinished | None = None


class TerminalRenderer(LineRenderer):
    """Lines that stay, and below them a block: what goes on, for how long, and how far the build is.

    A terminal may change its size at any time.

    Args:
        out: the terminal.
        colours: whether there are any.
        clock: seconds that only ever grow.
        size: returns columns and rows; those of `out` by default.
        directory: for the output of steps that goes on; None is where temporary files are.
        tick: seconds until the block is drawn again.
    """

    shows_failed_output = True

    def __init__(
        self,
        out: BinaryIO,
        *,
        colours: bool = True,
        clock: Callable[[], float] = time.monotonic,
        size: Callable[[], tuple[int, int]] | None = None,
        directory: Path | None = None,
        tick: float = _TICK_SECONDS,
    ) -> None:
        self._colours = colours
        self._screen = Screen(out, size)
        self._directory = directory
        self._began = clock()
        self._phase: Task | None = None
        self._tasks: dict[int, Task] = {}
        self._running: dict[int, _Step] = {}
        self._failed: list[_Step] = []
        self._steps = self._executed = self._cached = 0
        self._handlers: dict[type[Event], Callable[..., None]] = {
            BuildStarted: self._plan,
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
            Notice: self._told,
            PeerRefused: self._peer_refused,
            ImageStored: self._image_stored,
            BuildFailed: self._build_failed,
        }
        super().__init__(out, clock, tick)

    def draw(self) -> None:
        """Draw the block as things stand; done again and again."""
        self._screen.show(self._rows())

    def abandon(self) -> None:
        """Remove the block."""
        self._screen.abandon()

    # --- how it is written ------------------------------------------------------------------------

    def _receive(self, event: Event) -> None:
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def _leave(self) -> None:
        self._screen.show([])
        # A shell in the place of a step that has failed is of use to who knows how.
        failed, self._failed = self._failed, []
        for step in failed:
            self._show_failed(step, self._clock())

    def _end(self) -> None:
        self._stop()
        self.draw()

    def _on_tick(self) -> None:
        self.draw()

    def _line(self, text: str, style: str = "") -> None:
        self._screen.write("".join(f"{self._styled(line, style)}\n" for line in text.split("\n")))
        self.draw()
        self._out.flush()

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if style and self._colours else text

    # --- the block --------------------------------------------------------------------------------

    def _rows(self) -> list[str]:
        """Return the block: what goes on, the last lines of steps as far as there is room, the sum."""
        columns, most = self._screen.room
        now = self._clock()
        steps = list(self._running.values())
        tasks = [task for task in self._tasks.values() if now - task.began >= _SHORT_SECONDS]
        if not steps and not tasks and self._phase and now - self._phase.began >= _SHORT_SECONDS:
            tasks.append(self._phase)
        count = len(steps) + len(tasks)
        if not count or most < 1:
            return []
        room = most - 1 if self._steps or count > 1 else most
        shown = count if count <= room else max(room - 1, 1)
        steps, tasks = steps[:shown], tasks[: max(shown - len(steps), 0)]
        lines = _shared(room - shown - (shown < count), [step.log.last_lines(_LINES) for step in steps])
        rows = []
        for step, output in zip(steps, lines, strict=True):
            amounts = [human_size(step.bytes)] if step.bytes else []
            rows.append(self._row(header(step.event), [*amounts, human_time(now - step.began)], BOLD))
            rows += [self._styled(fit(f"  {line}", columns), DIM) for line in output]
        for task in tasks:
            amounts = [amount] if (amount := task.amount()) else []
            rows.append(self._row(task.name, [*amounts, human_time(now - task.began)]))
        if shown < count and len(rows) < room:
            rows.append(fit(f"and {count - shown} more", columns))
        if len(rows) < most and room < most:
            rows.append(self._styled(fit(self._sum(now), columns), DIM))
        return rows

    def _row(self, text: str, tail: Sequence[str], style: str = "") -> str:
        """Write a row whose end is worth more than its begin: a small terminal keeps room for both."""
        columns, _ = self._screen.room
        while tail and cells(end := f"  {', '.join(tail)}") > columns * 2 // 3:
            tail = tail[1:]
        end = end if tail else ""
        return self._styled(fit(text, columns - cells(end)), style) + self._styled(end, DIM)

    def _sum(self, now: float) -> str:
        total = f"total {human_time(now - self._began)}"
        if not self._steps:
            return total
        of_cache = f", {self._cached} cached" if self._cached else ""
        return f"{total}, {self._executed + self._cached} of {counted(self._steps, 'step')}{of_cache}"

    # --- phases and tasks -------------------------------------------------------------------------

    def _plan(self, event: BuildStarted) -> None:
        self._steps = event.steps
        self._build_started(event)

    def _phase_started(self, event: PhaseStarted) -> None:
        self._end_phase()
        self._phase = Task(PHASES.get(event.phase, one_line(event.name)), self._clock())

    def _end_phase(self) -> None:
        phase, self._phase = self._phase, None
        # Beside steps it says nothing, and its tasks say more.
        if phase is not None and not self._running and not self._tasks:
            self._took(phase, self._clock() - phase.began)

    def _task_started(self, event: TaskStarted) -> None:
        self._tasks[event.task] = Task(one_line(event.name), self._clock(), event.total_bytes)

    def _task_progress(self, event: TaskProgress) -> None:
        if event.task in self._tasks:
            self._tasks[event.task].bytes = event.bytes

    def _task_finished(self, event: TaskFinished) -> None:
        task = self._tasks.pop(event.task, None)
        if task is not None:
            task.bytes = event.bytes or task.total
            self._took(task, event.seconds)

    def _took(self, task: Task, seconds: float) -> None:
        if seconds >= LONG_SECONDS:
            self._line(fit(task.ended(seconds), self._screen.room[0]), DIM)
        else:
            # What a command has to say when its work is done goes to the same terminal by another stream.
            self.draw()
            self._out.flush()

    # --- steps ------------------------------------------------------------------------------------

    def _step_started(self, event: StepStarted) -> None:
        self._end_phase()
        log = Log(self._directory, colours=self._colours)
        self._running[event.step] = _Step(event, self._clock(), log)

    def _step_cached(self, event: StepCached) -> None:
        self._cached += 1
        self._line(self._row(header(event), [origin_of(event)], DIM))

    def _step_output(self, event: StepOutput) -> None:
        if event.step in self._running:
            self._running[event.step].log.write(event.stream, event.data)

    def _step_progress(self, event: StepProgress) -> None:
        if event.step in self._running:
            self._running[event.step].bytes = event.bytes

    def _step_finished(self, event: StepFinished) -> None:
        step = self._running.pop(event.step, None)
        if step is None:
            return
        if event.exit_code:
            step.failure = event
            self._failed.append(step)
            return
        self._executed += 1
        step.log.close()
        amounts = [human_size(step.bytes)] if step.bytes else []
        self._line(self._row(header(step.event), [*amounts, f"{event.seconds:.1f}s"], BOLD))

    def _told(self, event: Notice) -> None:
        step = self._running.get(event.step)
        if step is None:
            self._notice(event)
        else:
            step.log.add(f"\n{event.level}: {one_line(event.message)}\n")

    # --- the end ----------------------------------------------------------------------------------

    def _image_stored(self, event: ImageStored) -> None:
        self._stop()
        # Nobody tells of the FROM of a stage that was not needed.
        unneeded = self._steps - self._executed
        self._stored(event, f", {unneeded} of {counted(self._steps, 'step')} cached" if unneeded > 0 else "")

    def _build_failed(self, event: BuildFailed) -> None:
        """Show what failed steps have written; the error itself goes to standard error after that."""
        now = self._clock()
        steps = sorted(
            self._failed + list(self._running.values()), key=lambda step: step.event.step == event.step
        )
        interrupted = event.exit_status == ExitStatus.INTERRUPTED
        self._running, self._failed = {}, []
        self._stop()
        for step in steps:
            concerned = step.failure or step.event.step == event.step or not event.step
            if concerned and not interrupted:
                self._show_failed(step, now)
            else:
                self._screen.write(
                    self._row(header(step.event), [f"stopped after {now - step.began:.1f}s"]) + "\n"
                )
            step.log.close()
        self._screen.show([])
        self._out.flush()
        self._steps, self._phase = 0, Task("cleaning up", now)

    def _show_failed(self, step: _Step, now: float) -> None:
        if step.failure:
            end = f"failed after {step.failure.seconds:.1f}s, exit code {step.failure.exit_code}"
        else:
            end = f"stopped after {now - step.began:.1f}s"
        self._screen.write(self._styled(fit(header(step.event), self._screen.room[0]), BOLD) + "\n")
        if step.log:
            for piece in step.log.pieces():
                self._out.write(piece)
            self._screen.write(_RESET if self._colours else "")
        self._screen.write(self._styled(f"{number_of(step.event)} {end}", RED) + "\n")
        step.log.close()

    def _stop(self) -> None:
        """Nothing goes on any more."""
        for step in (*self._running.values(), *self._failed):
            step.log.close()
        self._phase, self._tasks, self._running, self._failed = None, {}, {}, []


def _shared(room: int, lines: Sequence[list[str]]) -> list[list[str]]:
    """Share rows: each step gets the last of its lines, none more than another that has as many."""
    kept = [0] * len(lines)
    while room > 0 and any(count < len(each) for count, each in zip(kept, lines, strict=True)):
        for index, each in enumerate(lines):
            if room > 0 and kept[index] < len(each):
                kept[index] += 1
                room -= 1
    return [each[len(each) - count :] for count, each in zip(kept, lines, strict=True)]
