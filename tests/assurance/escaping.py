"""Runs in a RUN as root, and tries by chance to reach what is outside; says what it tried, and what worked.

It has the modules of `attack.py`, and no other: `python escaping.py SEED COUNT OUTSIDE KEY`.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
KEYCTL = 219 if ARM else 250
NOT_FUZZED = {169, 246, 320, 142, 88} | {57, 58, 56, 435, 60, 231, 34, 35, 61, 247}
"""Ends of the machine, where they should be allowed; new processes, and waits forever."""
DIRECTORIES = ["/", "/proc", "/sys", "/dev", "/proc/sys", "/mnt", "/tmp", "/etc", "/proc/1/root", "/dev/shm"]
TYPES = [b"tmpfs", b"proc", b"sysfs", b"cgroup2", b"devtmpfs", b"overlay", b"ext4", b"bpf", b"tracefs", None]


class Chance:
    """Numbers by chance (splitmix64); `random` is not there."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """Return a number from 0 on."""
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        mixed = (self._state ^ self._state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return (mixed ^ mixed >> 31) % limit

    def of(self, items: list) -> object:  # type: ignore[type-arg]
        """Return one of them."""
        return items[self.below(len(items))]


class Attempts:
    """What is tried; each method returns what worked and should not have, or an empty text."""

    def __init__(self, chance: Chance, outside: str, key: str) -> None:
        self._chance = chance
        self._outside = outside
        self._key = key
        self._entries = self._kernel_entries()

    def _kernel_entries(self) -> list[str]:
        found = []
        for top in ("/proc/sys", "/sys", "/proc/1", "/proc/irq", "/proc/bus"):
            for folder, _, names in os.walk(top):
                found += [f"{folder}/{name}" for name in names]
                if len(found) > 20_000:
                    return found
        return [*found, "/proc/sysrq-trigger", "/proc/kcore", "/proc/kmsg", "/proc/timer_list"]

    def _path(self) -> bytes:
        return str(self._chance.of([*DIRECTORIES, self._outside])).encode()

    def mount(self) -> str:
        flags = self._chance.of([0, 4096, 4096 | 16384, 32 | 4096, 8192, 1 << 18, 1 << 20])
        kind = self._chance.of(TYPES)
        data = self._chance.of([None, b"lowerdir=/:/proc", b"mode=777"])
        done = LIBC.mount(self._path(), self._path(), kind, ctypes.c_ulong(int(flags)), data)  # type: ignore[call-overload]
        return f"mount of {kind!r}, flags {flags}" if done == 0 else ""

    def unmount(self) -> str:
        path = self._chance.of(["/proc", "/proc/sys", "/sys", "/dev", "/dev/null", "/", "/dev/pts"])
        done = LIBC.umount2(str(path).encode(), self._chance.of([0, 1, 2, 4, 8]))
        return f"unmount {path}" if done == 0 else ""

    def namespace(self) -> str:
        flags = 0
        for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000, 0x4000000, 0x2000000, 0x80):
            flags |= flag * self._chance.below(2)
        if flags and self._chance.below(2):
            return f"unshare {flags:x}" if LIBC.unshare(flags) == 0 else ""
        name = self._chance.of(["mnt", "pid", "net", "user", "ipc", "uts", "cgroup", "time"])
        descriptor = os.open(f"/proc/1/ns/{name}", os.O_RDONLY)
        return f"setns {name}" if LIBC.setns(descriptor, 0) == 0 else ""

    def kernel_entry(self) -> str:
        path = str(self._chance.of(self._entries))
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            if path.startswith("/proc/1/"):  # a user's own: nearly all of them open, and few take anything
                os.write(descriptor, b"1")
                return f"{path} takes a value"
        finally:
            os.close(descriptor)
        return f"{path} opens for writing"

    def device(self) -> str:
        major, minor = self._chance.below(260), self._chance.below(20)
        kind = self._chance.of([0o060600, 0o020600])
        path = f"/device-{major}-{minor}"
        os.mknod(path, int(kind), os.makedev(major, minor))  # type: ignore[call-overload]
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        return f"device {major}:{minor}"

    def trace(self) -> str:
        request = self._chance.of([16, 0x4206])
        return f"ptrace {request} of 1" if LIBC.ptrace(request, 1, None, None) == 0 else ""

    def host_socket(self) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(
                str(self._chance.of([f"{self._outside}/socket", f"/proc/1/root{self._outside}/socket"]))
            )
        return "a socket of the host"

    def keyring(self) -> str:
        ring = ctypes.c_long(int(self._chance.of([-1, -2, -3, -4, -5, -6, -7])))  # type: ignore[call-overload]
        number = LIBC.syscall(ctypes.c_long(KEYCTL), ctypes.c_long(10), ring, b"user", self._key.encode(), 0)
        return "the caller's key" if number > 0 else ""

    def link(self) -> str:
        """Plant links for what the host writes here later, and race with it."""
        name = f"/planted/{self._chance.below(8)}"
        os.makedirs("/planted", exist_ok=True)
        for _ in range(20):
            if os.path.islink(name):
                os.unlink(name)
                os.mkdir(name)
            elif os.path.isdir(name):
                os.rmdir(name)
            else:
                way = self._chance.of(["", "../../../../../../..", "/proc/1/root", "/proc/self/root"])
                os.symlink(f"{way}{self._outside}", name)
        return ""

    def any_call(self) -> str:
        number = self._chance.below(300 if ARM else 450)
        if number in NOT_FUZZED:
            return ""
        words = [b"/proc/sys", b"/", b"\xff" * 64, 0, 1, 3, -1, 4096, 2**31 - 1]
        given = [self._chance.of(words) for _ in range(6)]
        LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(g) if isinstance(g, int) else g for g in given))
        return ""


def tried(attempt: object) -> str:
    """Try something in a process of its own, which may die or hang of it; return what worked."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        LIBC.alarm(2)
        try:
            os.write(into, attempt().encode()[:500])  # type: ignore[operator]
        except OSError:
            os._exit(0)
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said.decode()


def main() -> None:
    """Try so many times, and print the counts and what worked."""
    seed, count, outside, key = sys.argv[1:]
    chance = Chance(int(seed))
    attempts = Attempts(chance, outside, key)
    kinds = [name for name in dir(attempts) if not name.startswith("_")]
    counts: dict[str, int] = {}
    worked = []
    for _ in range(int(count)):
        kind = str(chance.of(kinds))
        counts[kind] = counts.get(kind, 0) + 1
        chance.below(2)  # a child's numbers are its own; the next child has others
        if said := tried(getattr(attempts, kind)):
            worked.append(f"{kind}: {said}")
    print("TRIED", json.dumps({"counts": counts, "worked": worked[:20]}), flush=True)


main()
