"""The system calls that Python 3.11 has no function for, through the C library (man 2 of each name)."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    _check(_libc().unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount `source` on `target`; empty strings are passed as NULL."""
    encoded = [os.fsencode(text) if text else None for text in (source, target, kind, data)]
    result = _libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(result, f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Unmount `target` lazily."""
    _check(_libc().umount2(os.fsencode(target), _MNT_DETACH), f"umount {target}")


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root of this mount namespace and put the old one at `old`."""
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"pivot_root: unknown machine type {os.uname().machine}")
    _check(_libc().syscall(ctypes.c_long(number), os.fsencode(new), os.fsencode(old)), "pivot_root")


def die_with_parent(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent thread ends."""
    _prctl(_PR_SET_PDEATHSIG, signum)


def hide_memory() -> None:
    """Keep this process out of core dumps and of the reach of others with the same uid."""
    _prctl(_PR_SET_DUMPABLE, 0)


def hide_arguments() -> None:
    """Blank this process's command line, which anybody in its pid namespace could read."""
    with open("/proc/self/stat", "rb") as file:
        # After the name in parentheses; arg_start and arg_end are fields 48 and 49 (proc(5)).
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    ctypes.memset(start, 0, end - start)


def drop_capabilities(keep: frozenset[int]) -> None:
    """Drop every capability outside `keep` from all sets, the bounding set included."""
    number = 0
    while _libc().prctl(_PR_CAPBSET_READ, number, 0, 0, 0) >= 0:
        if number not in keep:
            _prctl(_PR_CAPBSET_DROP, number)
        number += 1
    _libc().prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # EINVAL before Linux 4.3
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc().capget(header, data), "capget")
    words = struct.unpack("=6I", data.raw)
    masks = [sum(1 << (item - base) for item in keep if base <= item < base + 32) for base in (0, 32)]
    now = [words[1] & masks[0], words[4] & masks[1]]
    # Inheritable stays empty: a file with inheritable capabilities must not pass them on.
    _check(_libc().capset(header, struct.pack("=6I", now[0], now[0], 0, now[1], now[1], 0)), "capset")


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")
