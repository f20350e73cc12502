"""What this process has started, directly or not, as /proc tells it."""

from __future__ import annotations

import os
from pathlib import Path

from support import family


def descendants() -> set[int]:
    return family({os.getpid()}) - {os.getpid()}


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def guests() -> list[int]:
    """Processes that run vminit itself, without the sandbox's own."""
    return [
        pid
        for pid in descendants()
        if b"firebuild_bootstrap.guest.main" in (line := read(pid, "cmdline")) and b"bwrap" not in line
    ]
