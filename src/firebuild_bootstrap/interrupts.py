"""Turns SIGINT, SIGTERM and SIGHUP into one `Interrupted`, so that a build unwinds and cleans up.

Only the first signal counts: whoever is cleaning up must not be interrupted in it. A process that
really has to go can still be killed; the janitor of the build's workspace cleans up then.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from firebuild_bootstrap.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The signals of a build; `deferred` keeps them from tearing an atomic operation apart."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._deferring = False
        self._raised = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; main thread only.

        Raises:
            Interrupted: at the point that is being executed when the first signal arrives.
        """
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish; a signal that arrives in it is raised at its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self._raise_once()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)
        if not self._deferring:
            self._raise_once()

    def _raise_once(self) -> None:
        if self._received is not None and not self._raised:
            self._raised = True
            raise Interrupted(f"the build was interrupted ({self._received.name})")
