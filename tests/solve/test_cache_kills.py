"""Builds and prunes that are killed at any moment, side by side."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

from firebuild_bootstrap.solve.cache import Cache

# Commits chains of layers and says which are finished; or prunes. It goes on until it is killed.
WORKER = """
import itertools, os, sys
from pathlib import Path
from firebuild_bootstrap.solve.cache import Cache
home, what = Path(sys.argv[1]), sys.argv[2]
for turn in itertools.count():
    with Cache(home) as cache:
        if what == "prune":
            cache.prune(everything=turn % 3 == 0, max_size=4)
            print("pruned", flush=True)
            continue
        chain = [f"{turn % 5}{depth}".encode().hex().ljust(64, "0") for depth in range(4)]
        entries = cache.find(chain)
        for key in chain[len(entries):]:
            directory = home / "builds" / f"{os.getpid()}-{turn}-{len(entries)}"
            directory.mkdir(parents=True)
            (directory / "key").write_text(key)
            entries.append(cache.commit(key, directory, parent=entries[-1] if entries else None, size=1))
        assert [(entry.path / "key").read_text() for entry in entries] == chain
        print(*chain, flush=True)
"""


def start(home: Path, what: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(home), what]
    # Without a buffer, where `communicate` would not find what `readline` has read too far.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def kill(process: subprocess.Popen[bytes]) -> list[str]:
    """End it and return the lines that it finished."""
    process.kill()
    output, errors = process.communicate()
    assert (process.returncode, errors) == (-signal.SIGKILL, b"")
    return [line for line in output.decode().splitlines(keepends=True) if line.endswith("\n")]


def read(process: subprocess.Popen[bytes], lines: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().decode() for _ in range(lines)]


def consistent(home: Path) -> set[str]:
    """Check that all that is found is whole, and return its keys."""
    with Cache(home) as cache:
        usage = {use.entry.id: use for use in cache.usage()}
        for use in usage.values():
            assert (use.entry.path / "key").read_text() == use.entry.key
            assert use.entry.parent in {"", *usage}
            assert not use.in_use, "a lock has outlived its process"
        return {use.entry.key for use in usage.values() if use.found}


def test_a_killed_build_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    for seed in range(4):
        builds = [start(tmp_path, "build") for _ in range(2)]
        lines = [read(build, 1 + random.Random(seed).randrange(12)) for build in builds]
        lines += [kill(build) for build in builds]
        finished = {key for each in lines for line in each for key in line.split()}
        assert finished
        assert finished <= consistent(tmp_path)


def test_builds_and_prunes_that_are_killed_leave_nothing_half_made(tmp_path: Path) -> None:
    for seed in range(3):
        workers = [start(tmp_path, what) for what in ("build", "build", "prune")]
        for worker in workers:
            read(worker, 1 + random.Random(seed).randrange(20))
        for worker in workers:
            kill(worker)
        consistent(tmp_path)
    with Cache(tmp_path) as cache:
        cache.prune(everything=True)
    for folder in ("keys", "records", "layers"):
        assert list((tmp_path / "cache" / "results" / "default" / folder).iterdir()) == []
