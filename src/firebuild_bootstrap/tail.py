"""What all events of a build go through: one at a time, and the last lines of each step are kept."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from firebuild_bootstrap.events import (
    BuildFailed,
    Event,
    EventSink,
    StageFinished,
    StageStarted,
    StepFinished,
    StepOutput,
    StepProgress,
    StepStarted,
)
from firebuild_pki.display import escaped

_KEPT_BYTES: Final = 16 * 1024
_KEPT_LINES: Final = 15


class OutputTail:
    """Passes events on, one at a time, and remembers the end of each step's output.

    The build's own thread and those of its server tell what happens at the same time; this is the one lock
    that makes a sequence of it.

    Args:
        sink: where the events go. It may cause events itself.
    """

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._lock = threading.RLock()
        self._tails: defaultdict[int, bytes] = defaultdict(bytes)

    def __call__(self, event: Event) -> None:
        """Pass one event on, from any thread."""
        with self._lock:
            if isinstance(event, StepOutput):
                self._tails[event.step] = (self._tails[event.step] + event.data)[-_KEPT_BYTES:]
            self._sink(event)

    def last_lines(self, step: int) -> list[str]:
        """Return the last lines of a step, fit for a message."""
        text = self._tails[step].decode("utf-8", "surrogateescape")
        return [escaped(line.expandtabs()) for line in text.splitlines()[-_KEPT_LINES:]]


class InTurn:
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
