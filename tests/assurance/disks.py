"""Disks that are full, or become read-only, at any moment."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from assurance.commands import Started
from assurance.trials import Effort, trial
from e2e.killing import Harness
from support import await_end_of_processes, eventually, privately


class Small:
    """A file system in memory with little room."""

    what = "full"
    SIZE = 256 << 20

    def __init__(self, directory: Path) -> None:
        self.root = directory / "small"
        self.root.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE},nr_inodes=20000", "none", str(self.root)]
        subprocess.run(command, check=True)

    def fill(self, chance: random.Random) -> str:
        """Leave a random number of bytes, or of inodes; return which."""
        free = os.statvfs(self.root)
        if chance.random() < 0.3:
            left = free.f_files - free.f_ffree + int(200 ** chance.random())
            self._remount(f"nr_inodes={left}")
            return "inodes"
        left = int((16 << 20) ** chance.random())
        with open(self.root / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_bsize - left))
        return "bytes"

    def empty(self) -> None:
        """Make room again."""
        (self.root / "filler").unlink(missing_ok=True)
        self._remount("nr_inodes=20000")

    def close(self) -> None:
        """Take it away."""
        subprocess.run(["umount", "--lazy", self.root], check=True)

    def _remount(self, option: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{option}", self.root], check=True)


class Failing:
    """An ext4 file system that the kernel makes read-only, as it does after an error of the disk."""

    what = "failing"

    def __init__(self, directory: Path) -> None:
        self.root = directory / "failing"
        self._image = directory / "failing.ext4"
        self._device = ""
        self.root.mkdir()
        with open(self._image, "wb") as file:
            file.truncate(1 << 30)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", self._image], check=True)
        self.mount()

    def mount(self) -> None:
        """Mount it, as it is."""
        losetup = ["losetup", "--find", "--show", str(self._image)]
        self._device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
        subprocess.run(["mount", "-o", "errors=remount-ro", self._device, self.root], check=True)

    def fail(self) -> None:
        """Make it read-only in the midst of what is written."""
        Path("/sys/fs/ext4", Path(self._device).name, "trigger_fs_error").write_text("a trial")

    def close(self) -> None:
        """Take it away, also where somebody has a file open."""
        subprocess.run(["umount", "--lazy", self.root], check=True)
        subprocess.run(["losetup", "--detach", self._device], check=True)

    def repair(self) -> None:
        """Mount it again, repaired, with the files that had come to the disk."""
        # What cleans up behind a command may work there yet.
        assert eventually(lambda: subprocess.run(["umount", self.root], check=False).returncode == 0, 30)
        done = subprocess.run(["e2fsck", "-fy", self._device], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), done.stdout
        subprocess.run(["losetup", "--detach", self._device], check=True)
        self.mount()


def say_where(harness: Harness, started: Started, name: str) -> str:
    """See that a command succeeded, or said where there is no room; return a word for which."""
    ended = started.end().in_words()
    if ended.status == 0:
        return f"{name} that had room"
    # What a RUN cannot write is said by its own program, and vminit knows no place outside.
    known = str(harness.home.parent) in ended.err or "vminit failed" in ended.err
    assert known or ended.status == 1, str(ended)
    return f"{name} that had not"


def lately(harness: Harness, name: str, moment: Callable[[Started], None]) -> str:
    """Begin a command, and do something in the midst of it."""
    started = harness.start(name)
    moment(started)
    return say_where(harness, started, name)


def try_full(effort: Effort, harness: Harness, disk: Small, name: str) -> None:
    """Run a command on a full disk."""
    harness.prepare(name)
    what = disk.fill(effort.chance)
    try:
        kind = lately(harness, name, lambda started: None)
    finally:
        disk.empty()
    effort.counts[f"{what}: {kind.removeprefix(name + ' that ')}"] += 1
    harness.check(name)
    harness.build()


def try_failing(effort: Effort, harness: Harness, disk: Failing, name: str) -> None:
    """Have the disk fail while a command runs."""
    harness.prepare(name)
    os.sync()
    seconds = effort.chance.random() * 4

    def moment(started: Started) -> None:
        with suppress(subprocess.TimeoutExpired):
            started.process.wait(seconds)
        disk.fail()

    try:
        kind = lately(harness, name, moment)
    finally:
        await_end_of_processes(harness.home, 120)
        disk.repair()
    harness.repair()
    effort.counts[f"read-only: {kind.removeprefix(name + ' that ')}"] += 1
    harness.check(name)
    harness.build()


@contextmanager
def closing_late(disk: Small | Failing) -> Iterator[None]:
    """Take a disk away at the end, when nobody uses it any more."""
    try:
        yield
    finally:
        with suppress(AssertionError):
            await_end_of_processes(disk.root, 60)
        disk.close()


def on_a_disk(
    effort: Effort, kind: type[Small | Failing], attempt: Callable[..., None], *, leaves_nothing: bool
) -> None:
    """Try all commands in turn on a disk of a kind, in a mount namespace of its own."""

    def tries() -> None:
        disk = kind(effort.directory)
        with closing_late(disk):
            harness = Harness(disk.root)
            while effort.goes_on():
                for name in effort.shuffled(harness.works()):
                    effort.attempt(
                        f"{name} on a {kind.what} disk", partial(attempt, effort, harness, disk, name)
                    )
            if leaves_nothing:
                effort.attempt("look for what is left", harness.nothing_is_left)

    privately(tries)


@trial(
    "full-disk",
    "commands on a disk with a random number of bytes or inodes left, and what comes when there is room",
    seconds=300,
    needs=("busybox", "root", "userns"),
)
def full(effort: Effort) -> None:
    """Try all commands in turn on a disk that is nearly full."""
    on_a_disk(effort, Small, try_full, leaves_nothing=True)


@trial(
    "failing-disk",
    "commands whose disk becomes read-only in the midst, as after an error, and what comes after its repair",
    seconds=300,
    needs=("busybox", "root", "userns", "mke2fs", "e2fsck"),
)
def failing(effort: Effort) -> None:
    """Try all commands in turn on a disk that fails."""
    on_a_disk(effort, Failing, try_failing, leaves_nothing=False)
