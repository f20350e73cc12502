"""SIGINT, SIGTERM and SIGHUP: every command ends with status 130, without a traceback and after its clean-up.

An exception out of a signal handler could tear any statement apart, with a lock held or a process just
started. So during a build the handler only takes a note, and the build asks for it wherever it waits. The
other commands hold nothing of that kind, and have nowhere to ask: there it raises `KeyboardInterrupt`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from firebuild_bootstrap.errors import ExitStatus, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# How CPython calls the module that imports all others.
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Interrupts:
    """The signals of one build, or of one command.

    Args:
        raising: raise `KeyboardInterrupt` at once instead of waiting for `check`.
    """

    def __init__(self, *, raising: bool = False) -> None:
        self._raising = raising
        self._received: signal.Signals | None = None
        self.at_sudden_end: Callable[[], None] = lambda: None
        """Called right before a second signal ends the process, in the handler, so it may take no lock."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; main thread only.

        A second signal ends the process at once, with the same exit status. What it leaves is removed by
        the cleanup process of the build's workspace.
        """
        handle = self._raise if self._raising else self._handle
        previous = {
            number: signal.signal(number, handle) for number in SIGNALS if not _hung_up_for_good(number)
        }
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

    def instead_of(self, error: BaseException) -> BaseException:
        """Return the interruption if there was one, whatever came of the exception on its way up."""
        return error if self._received is None else Interrupted(f"interrupted ({self._received.name})")

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        while frame is not None:
            if frame.f_code.co_filename == _IMPORT_SYSTEM:
                # Its callbacks print an exception and go on, extension modules make others of it; and what a
                # command has not imported yet it has not used yet.
                os._exit(ExitStatus.INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            with suppress(Exception):
                self.at_sudden_end()
            os.write(2, b"error: interrupted again, the rest is cleaned up in the background\n")
            os._exit(ExitStatus.INTERRUPTED)
        self._received = signal.Signals(number)


def _hung_up_for_good(number: signal.Signals) -> bool:
    """Tell whether this is SIGHUP, and nohup(1) has had it ignored."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
