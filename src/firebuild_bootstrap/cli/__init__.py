"""The command `firebuild`: parses, calls, renders. What it does is in the packages below it."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130  # `ExitStatus.INTERRUPTED`, whose import would delay the signal handlers


def main() -> None:
    """Run the command line and exit; a mistake of the user never ends in a traceback."""
    # Before anything is imported: that takes most of the time of a short command, and nothing has begun yet.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, _leave)
    from firebuild_bootstrap.cli.app import main as run

    run()


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
