"""Finding and ending the processes that hold a pipe open."""

from __future__ import annotations

import os
import signal
from contextlib import suppress


def end_holders(descriptor: int) -> list[int]:
    """Send SIGKILL to the other processes that have the pipe `descriptor` open and return their ids.

    Only processes that this user may look into are found (proc(5), /proc/pid/fd): its own, and those of
    user namespaces that it made.
    """
    wanted = _identity(os.fstat(descriptor))
    ended = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid() and _holds(name, wanted):
            # The number may belong to another process by now, so it is looked at again once it is held.
            with suppress(ProcessLookupError):
                held = os.pidfd_open(int(name))
                try:
                    if _holds(name, wanted):
                        signal.pidfd_send_signal(held, signal.SIGKILL)
                        ended.append(int(name))
                finally:
                    os.close(held)
    return ended


def _holds(process: str, wanted: tuple[int, int]) -> bool:
    folder = f"/proc/{process}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # it has ended, or is another user's
        return False
    for name in names:
        with suppress(OSError):
            if _identity(os.stat(f"{folder}/{name}")) == wanted:
                return True
    return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
