"""Ending processes of sandboxes that outlived whoever they worked for.

The cleanup process of each build imports it: it needs no more than the standard library's small modules.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def end_holders(descriptor: int) -> list[int]:
    """Send SIGKILL to the other processes that have the pipe `descriptor` open and return their ids.

    Only processes that this user may look into are found (proc(5), /proc/pid/fd): its own, and those of
    user namespaces that it made.
    """
    wanted = _identity(os.fstat(descriptor))
    return _end(lambda name: int(name) != os.getpid() and _holds(name, wanted))


def end_orphans(store: Path) -> list[int]:
    """Send SIGKILL to what waits forever of sandboxes with files of a store, and return the process ids.

    bubblewrap's child does not notice, until its ids are mapped, that its monitor has died, which dies with
    whoever called it.
    """
    return _end(lambda name: _is_orphan(name, os.fsencode(store)))


def _end(unwanted: Callable[[str], bool]) -> list[int]:
    ended = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        if unwanted(name):
            # The number may belong to another process by now, so it is looked at again once it is held.
            with suppress(ProcessLookupError):
                held = os.pidfd_open(int(name))
                try:
                    if unwanted(name):
                        signal.pidfd_send_signal(held, signal.SIGKILL)
                        ended.append(int(name))
                finally:
                    os.close(held)
    return ended


def _is_orphan(process: str, store: bytes) -> bool:
    """Whether it is the first process of a PID namespace that bubblewrap made, and its monitor is gone."""
    folder = Path("/proc", process)
    with suppress(OSError, KeyError):  # it has ended, or is another user's
        command = (folder / "cmdline").read_bytes()
        if store not in command or b"\0--userns-block-fd\0" not in command:
            return False
        lines = (folder / "status").read_text("ascii", "replace").splitlines()
        status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        ids, parent = status["NSpid"], status["PPid"][0]  # proc(5)
        return len(ids) > 1 and ids[-1] == "1" and Path("/proc", parent, "cmdline").read_bytes() != command
    return False


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
