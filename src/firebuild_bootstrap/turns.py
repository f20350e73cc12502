"""Events of stages that run side by side, passed on one stage after the other; what waits is on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Final, Literal

from firebuild_bootstrap.events import (
    BuildFailed,
    Event,
    EventSink,
    Notice,
    StageFinished,
    StageStarted,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
)
from firebuild_pki.values import dataclass

_PIECE: Final = 64 * 1024


class Spool:
    """Bytes that wait to be shown, in a file without a name.

    Args:
        directory: where that is; None is where temporary files are, which may be memory.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self.size = 0

    def append(self, data: bytes) -> None:
        """Append to the file.

        Raises:
            OSError: the disk is full, say; nothing has been added then.
        """
        if self._file is None:
            self._file = TemporaryFile(dir=self._directory)  # noqa: SIM115 - `close` does
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], self.size + written)
        self.size += written

    def read(self, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield a part of it, or all, in pieces."""
        stop = self.size if end is None else end
        while self._file is not None and begin < stop:
            piece = os.pread(self._file.fileno(), min(_PIECE, stop - begin), begin)
            begin += len(piece)
            yield piece

    def close(self) -> None:
        """Delete the file, which has no name; nothing can be read any more."""
        if self._file is not None:
            self._file.close()


@dataclass(frozen=False)
class _Piece:
    """Output of a step in a spool."""

    step: int
    stream: Literal["stdout", "stderr"]
    begin: int
    end: int


class _Waiting:
    """The events of a stage that waits for its turn; output waits outside of memory."""

    def __init__(self, directory: Path | None) -> None:
        self._events: list[Event | _Piece] = []
        self._spool = Spool(directory)
        self.ended = False

    def add(self, event: Event) -> None:
        """Keep one more."""
        self.ended = self.ended or isinstance(event, StageFinished)
        if not isinstance(event, StepOutput):
            self._events.append(event)
            return
        begin = self._spool.size
        try:
            self._spool.append(event.data)
        except OSError:  # a full disk is no reason to lose output, or the build
            self._events.append(event)
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, _Piece) and (last.step, last.stream) == (event.step, event.stream):
            last.end = self._spool.size
        else:
            self._events.append(_Piece(event.step, event.stream, begin, self._spool.size))

    def pass_on(self, sink: EventSink) -> None:
        """Pass all of it on, once."""
        events, self._events = self._events, []
        for event in events:
            if isinstance(event, _Piece):
                for data in self._spool.read(event.begin, event.end):
                    sink(StepOutput(step=event.step, stream=event.stream, data=data))
            else:
                sink(event)
        self.close()

    def close(self) -> None:
        """Discard the events that wait."""
        self._spool.close()


class InTurn:
    """Shows stages that run side by side one after the other, so that their lines do not mix.

    What happens in the stage that began first passes as it comes; the others wait for its end.

    Args:
        sink: where the events go.
        directory: where output waits; None is where temporary files are.
    """

    def __init__(self, sink: EventSink, directory: Path | None) -> None:
        self._sink = sink
        self._directory = directory
        self._stage_of: dict[int, int] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._shown: int | None = None

    def __call__(self, event: Event) -> None:
        """Pass an event on, now or when it is its stage's turn."""
        match event:
            case StageStarted():
                self._waiting[event.step] = _Waiting(self._directory)
                self._sink_next()
            case StepStarted():
                self._stage_of[event.step] = self._newest(event.step)
            case BuildFailed(step=0):  # of no step, so that any of them may say why
                for waiting in list(self._waiting):
                    self._show(waiting)
            case BuildFailed():
                self._show(self._stage_of.get(event.step))
        stage = self._stage(event)
        if stage is None or stage == self._shown or stage not in self._waiting:
            self._sink(event)
        else:
            self._waiting[stage].add(event)
        if isinstance(event, StageFinished) and stage is not None and stage == self._shown:
            del self._waiting[stage]
            self._shown = None
            self._sink_next()

    def close(self) -> None:
        """Forget what waits."""
        for waiting in self._waiting.values():
            waiting.close()

    def _newest(self, step: int) -> int:
        """Return the stage that a step belongs to: numbers of steps go through all stages in their order."""
        return max((stage for stage in self._waiting if stage <= step), default=0)

    def _stage(self, event: Event) -> int | None:
        if isinstance(event, StageStarted | StageFinished):
            return event.step
        if isinstance(event, StepStarted | StepOutput | StepProgress | StepFinished | Notice):
            return self._stage_of.get(event.step)
        return None

    def _sink_next(self) -> None:
        """Show what the next stage has done so far; one that has ended meanwhile gives way to the next."""
        while self._shown is None and self._waiting:
            stage, waiting = next(iter(self._waiting.items()))
            waiting.pass_on(self._sink)
            if waiting.ended:
                del self._waiting[stage]
            else:
                self._shown = stage

    def _show(self, stage: int | None) -> None:
        """Show what a stage has done, out of its turn, because it has failed."""
        if stage is not None and stage != self._shown and stage in self._waiting:
            self._waiting.pop(stage).pass_on(self._sink)
