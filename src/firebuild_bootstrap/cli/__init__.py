"""The command `firebuild`: parses, calls, renders. What it does is in the packages below it."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main", "program"]

_INTERRUPTED = 130  # `ExitStatus.INTERRUPTED`, whose import would delay the signal handlers


def main(answer: int | None = None) -> None:
    """Run the command line and exit; a mistake of the user never ends in a traceback.

    Args:
        answer: where the process of a detached run says that its command has begun (`background`).
    """
    # Before anything is imported: that takes most of the time of a short command, and nothing has begun yet.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, _leave)
    # Whoever started us may ignore it, and then no child has a status.
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if answer is not None:  # who has started us keeps them back until here
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    else:  # who has started us for a detached run has the right locale, and our arguments
        from firebuild_bootstrap.locales import ensure_utf8

        ensure_utf8()
    from firebuild_bootstrap.cli.app import main as run

    run(answer)


def program(answer: int | None = None) -> None:
    """Be the installed command: run `main`, and end without taking every module apart.

    All is written and closed then; the rest takes Python as long as a step of a small build.
    """
    try:
        main(answer)
    except SystemExit as ended:
        from contextlib import suppress

        with suppress(OSError, ValueError, AttributeError):  # full, closed, or closed before we began
            sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else ended.code is not None)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
