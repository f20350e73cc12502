"""What it costs to write a tree as a file system image: our ext4, mkfs.erofs, and mke2fs -d.

    .venv/bin/python benchmarks/file_systems.py [--runs 3] [--tree /usr/share] [--million]

They take turns, so that a busy machine slows all; the ratios are what counts. `--million` writes a million
entries with ours, for its memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.layers.tar import Entry
from firebuild_bootstrap.layers.tree import tree_entries

ENV = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "MKE2FS_CONFIG": "/nonexistent"}


def a_million() -> Iterator[tuple[Entry, bytes]]:
    """Yield entries that no disk has to hold: 100 directories of 9,000 files, and one of 100,000."""
    yield Entry("", "directory", 0o755), b""
    for folder in range(101):
        yield Entry(f"{folder:03}", "directory", 0o755), b""
        for number in range(9_000 if folder < 100 else 100_000):
            yield Entry(f"{folder:03}/a-file-of-some-name-{number:06}", "file", 0o644, size=1), b"x"


def timed(command: Sequence[str]) -> tuple[float, float, int]:
    """Run a command and return seconds on the clock, seconds of CPU, and its most memory in MiB."""
    begin = time.monotonic()
    process = subprocess.Popen(command, env={**os.environ, **ENV}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss >> 10


def main() -> None:
    """Write the tree with each, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tree", default="/usr/share")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--write", help=argparse.SUPPRESS)  # what a run starts: the image to be made
    asked = parser.parse_args()
    if asked.write:
        files = a_million() if asked.million else tree_entries(asked.tree)
        make_ext4(files, asked.write, Ext4Options())
        return
    ours = [sys.executable, __file__, "--tree", asked.tree]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        image = f"{name}/image"
        if asked.million:
            seconds, _, memory = timed([*ours, "--million", "--write", image])
            print(f"a million entries: {seconds:.1f} s, {memory} MiB")
            return
        blocks = [status.st_blocks for status in _statuses(asked.tree)]
        size = sum(blocks) >> 11
        ways = {
            "ours": [*ours, "--write", image],
            "mkfs.erofs": ["mkfs.erofs", "--quiet", image, asked.tree],
            "mke2fs -d": ["mke2fs", "-q", "-F", "-t", "ext4", "-d", asked.tree, image, f"{size * 2 + 200}M"],
        }
        found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
        for _ in range(asked.runs):
            for way, command in ways.items():
                found[way].append(timed(command))
                os.unlink(image)
    print(f"{asked.tree}: {len(blocks)} files, {size} MiB")
    print("\n| | seconds | CPU | MiB of memory | ratio to mkfs.erofs |\n|---|---|---|---|---|")
    base = statistics.median(run[0] for run in found["mkfs.erofs"])
    for way, runs in found.items():
        seconds, cpu, memory = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {way} | {seconds:.1f} | {cpu:.1f} | {memory:.0f} | {seconds / base:.2f} |")


def _statuses(tree: str) -> Iterator[os.stat_result]:
    for folder, names, files in os.walk(tree):
        for each in (*names, *files):
            yield os.lstat(f"{folder}/{each}")


if __name__ == "__main__":
    main()
