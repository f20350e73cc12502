"""The processes of a build, seen from outside."""

from __future__ import annotations

from pathlib import Path


def machines_of(firebuild: int) -> list[int]:
    """The QEMU processes below a firebuild."""
    return [pid for pid in pids() if name_of(pid).startswith("qemu-system") and firebuild in ancestors(pid)]


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def status_of(pid: int) -> list[str]:
    """State, parent and so on (proc(5)); nothing when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    return status_of(pid)[:1] not in ([], ["Z"])


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1 and (status := status_of(pid)):
        pid = int(status[1])
        found.append(pid)
    return found
