"""What all events of a build go through: one at a time, and the last lines of each step are kept."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Final

from firebuild_bootstrap.events import Event, EventSink, StepOutput
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
