"""Keeps the last lines that each step wrote, for the message of a failed build."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from firebuild_bootstrap.events import Event, EventSink, StepOutput
from firebuild_pki.display import escaped

_KEPT_BYTES: Final = 16 * 1024
_KEPT_LINES: Final = 15


class OutputTail:
    """Passes events on and remembers the end of each step's output.

    Args:
        sink: where the events go.
    """

    def __init__(self, sink: EventSink) -> None:
        self._sink = sink
        self._tails: defaultdict[int, bytes] = defaultdict(bytes)

    def __call__(self, event: Event) -> None:
        """Pass one event on."""
        if isinstance(event, StepOutput):
            self._tails[event.step] = (self._tails[event.step] + event.data)[-_KEPT_BYTES:]
        self._sink(event)

    def last_lines(self, step: int) -> list[str]:
        """Return the last lines of a step, fit for a message."""
        text = self._tails[step].decode("utf-8", "surrogateescape")
        return [escaped(line.expandtabs()) for line in text.splitlines()[-_KEPT_LINES:]]
