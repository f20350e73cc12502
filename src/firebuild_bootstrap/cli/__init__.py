"""The command `firebuild`: parses, calls, renders. What it does is in the packages below it."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main", "program"]

_INTERRUPTED = 130  # `ExitStatus.INTERRUPTED`, whose import would delay the signal handlers


def main() -> None:
    """Run the command line and exit; a mistake of the user never ends in a traceback."""
    # Before anything is imported: that takes most of the time of a short command, and nothing has begun yet.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, _leave)
    from firebuild_bootstrap.cli.app import main as run

    run()


def program() -> None:
    """Be the installed command: run `main`, and end without taking every module apart.

    All is written and closed then; the rest takes Python as long as a step of a small build.
    """
    try:
        main()
    except SystemExit as ended:
        from contextlib import suppress

        with suppress(OSError, ValueError, AttributeError):  # full, closed, or closed before we began
            sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else ended.code is not None)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
