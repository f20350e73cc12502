"""What this process has started, directly or not, as /proc tells it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def parents() -> dict[int, int]:
    """Every process with its parent."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
            except OSError:
                continue
            found[int(entry.name)] = int(after_name.split()[1])
    return found


def descendants() -> Iterator[int]:
    known = parents()
    for pid in known:
        ancestor = pid
        while ancestor not in (0, 1):
            ancestor = known.get(ancestor, 0)
            if ancestor == os.getpid():
                yield pid
                break


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
