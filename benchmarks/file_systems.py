"""What it costs to write a tree as a file system image: our ext4, `mkfs.erofs`, and `mke2fs -d`.

The tree is /usr/share of this machine. A million entries are 100 directories of 9,000 files, and
one of 100,000. A look-up in a directory of 70,000 names that is not in the kernel's memory yet takes 26
microseconds, where without an index it is 3,000.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.shape import Benchmark, Row, Run, timed
from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.layers.tar import Entry
from firebuild_bootstrap.layers.tree import tree_entries

TREE: Final = "/usr/share"
MILLION: Final = "a-million"
EROFS: Final = Row("/usr/share as ext4", "mkfs.erofs", "s", 2.0, ("mkfs.erofs",))
EROFS_MEMORY: Final = Row("the same, most memory", "mkfs.erofs", "MiB", None, ("mkfs.erofs",))
MKE2FS: Final = Row("/usr/share as ext4", "mke2fs -d", "s", None, ("mke2fs",))
MKE2FS_MEMORY: Final = Row("the same, most memory", "mke2fs -d", "MiB", None, ("mke2fs",))


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    memory: float
    """The most of it, in MiB."""


def a_million() -> Iterator[tuple[Entry, bytes]]:
    """Yield entries that no disk has to hold: 100 directories of 9,000 files, and one of 100,000."""
    yield Entry("", "directory", 0o755), b""
    for folder in range(101):
        yield Entry(f"{folder:03}", "directory", 0o755), b""
        for number in range(9_000 if folder < 100 else 100_000):
            yield Entry(f"{folder:03}/a-file-of-some-name-{number:06}", "file", 0o644, size=1), b"x"


def cost(words: Sequence[str], image: Path) -> Cost:
    """Run a command that writes an image, and remove the image."""
    environ = {**os.environ, "MKE2FS_CONFIG": "/nonexistent"}
    memory = 0

    def action() -> None:
        nonlocal memory
        process = subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{words[0]} ended with {process.returncode}")
        memory = usage.ru_maxrss

    seconds = timed(action)
    image.unlink()
    return Cost(seconds, memory / 1024)


def measure(run: Run) -> None:
    """Write the tree with each."""
    image = run.directory / "image"
    ours = [sys.executable, "-m", __name__]
    blocks = [status.st_blocks for status in _statuses(TREE)]
    size = sum(blocks) >> 11
    others = {
        (EROFS, EROFS_MEMORY): ["mkfs.erofs", "--quiet", str(image), TREE],
        (MKE2FS, MKE2FS_MEMORY): [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-d", TREE, str(image), f"{size * 2 + 200}M")
        ],
    }
    for _ in range(run.rounds):
        own = cost([*ours, TREE, str(image)], image)
        for (seconds, memory), words in others.items():
            if run.wants([seconds]):
                other = cost(words, image)
                run.add(seconds, own.seconds, other.seconds)
                run.add(memory, own.memory, other.memory)
    million = cost([*ours, MILLION, str(image)], image)
    run.note(f"/usr/share has {len(blocks):,} files and {size:,} MiB")
    run.note(f"a million entries take {million.seconds:.1f} s and {million.memory:.0f} MiB")


def _statuses(tree: str) -> Iterator[os.stat_result]:
    for folder, names, files in os.walk(tree):
        for each in (*names, *files):
            yield os.lstat(f"{folder}/{each}")


BENCHMARK: Final = Benchmark(
    "file-systems", __doc__, (EROFS, EROFS_MEMORY, MKE2FS, MKE2FS_MEMORY), measure, rounds=3
)

if __name__ == "__main__":  # what a run starts: the image is to be made
    make_ext4(
        a_million() if sys.argv[1] == MILLION else tree_entries(sys.argv[1]), sys.argv[2], Ext4Options()
    )
