"""SIGINT, SIGTERM and SIGHUP during a build: noticed at safe points, so that the build can clean up.

An exception out of a signal handler could tear any statement apart, with a lock held or a process just
started. So the handler only takes a note, and the build asks for it wherever it waits.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from firebuild_bootstrap.errors import ExitStatus, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The signals of one build."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self.at_sudden_end: Callable[[], None] = lambda: None
        """Called right before a second signal ends the process, in the handler, so it may take no lock."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; main thread only.

        A second signal ends the process at once, with the same exit status. What it leaves is removed by
        the janitor of the build's workspace.
        """
        previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                # On the way out an impatient signal must not replace the exit status.
                signal.signal(number, signal.SIG_IGN if self._received else handler)

    def check(self) -> None:
        """Return if no signal has arrived.

        Raises:
            Interrupted: one has; the message names it.
        """
        if self._received is not None:
            raise Interrupted(f"the build was interrupted ({self._received.name})")

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            with suppress(Exception):
                self.at_sudden_end()
            os.write(2, b"error: interrupted again, the rest is cleaned up in the background\n")
            os._exit(ExitStatus.INTERRUPTED)
        self._received = signal.Signals(number)
