"""Builds and prunes of one cache that are killed at any moment, side by side.

A program of its own: it forks, which a process with threads must not.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from firebuild_bootstrap.solve.cache import Cache
from solve.stores import key, layer, layer_trees, runtime


def build(home: Path, say: int) -> None:
    """Make chains of layers for ever, and say which keys are finished."""
    for turn in itertools.count():
        trees = layer_trees(home)
        cache = Cache(trees)
        chain = [key(f"{turn % 5}{depth}") for depth in range(4)]
        entries = cache.find(chain)
        for each in chain[len(entries) :]:
            directory = layer(home, f"{os.getpid()}-{turn}-{len(entries)}", each)
            entries.append(cache.commit(each, directory, parent=entries[-1] if entries else "", size=1))
        assert [(entry.path / "file").read_text() for entry in entries] == chain
        trees.close()
        os.write(say, " ".join(chain).encode() + b"\n")


def prune(home: Path, say: int) -> None:
    """Remove layers for ever."""
    for turn in itertools.count():
        Cache(layer_trees(home)).prune(everything=turn % 3 == 0, max_size=4)
        os.write(say, b"pruned\n")


class Worker:
    """One of them in a process of its own."""

    def __init__(self, work: Callable[[Path, int], None], home: Path) -> None:
        self._said, say = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                work(home, say)
            finally:
                os._exit(1)
        os.close(say)
        self._words = b""

    def wait(self, lines: int) -> None:
        """Wait until it has said so many lines."""
        while self._words.count(b"\n") < lines:
            self._words += os.read(self._said, 65536) or b"it died\n" * lines

    def kill(self) -> set[str]:
        """End it and return what it finished."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        assert os.WIFSIGNALED(status), "it failed"
        while piece := os.read(self._said, 65536):
            self._words += piece
        os.close(self._said)
        return set(self._words.rpartition(b"\n")[0].decode().split())


def consistent(home: Path) -> set[str]:
    """Check that all that is found is whole, and return its keys."""
    cache = Cache(layer_trees(home))
    usage = {use.entry.id: use for use in cache.usage()}
    for use in usage.values():
        assert (cache.trees.path(use.entry.id) / "file").read_text() == use.entry.key
        assert use.entry.parent in {"", *usage}
        assert not use.in_use, "a lock has outlived its process"
    return {use.entry.key for use in usage.values() if use.found}


def main(home: Path) -> None:
    """Kill builds alone, which loses nothing; then builds and prunes, which leaves nothing half-made."""
    runtime()  # asked once, and not by each of them
    chance = random.Random(1)
    for turn in range(8):
        works = [build, build, prune] if turn >= 4 else [build, build]
        workers = [Worker(work, home) for work in works]
        for worker in workers:
            worker.wait(1 + chance.randrange(10))
        finished = [worker.kill() for worker in workers]
        there = consistent(home)
        assert prune in works or set().union(*finished) <= there
    cache = Cache(layer_trees(home))
    cache.prune(everything=True)
    for folder in ("cache/keys", "cache/records", "content", "names", "staging"):
        assert not list((cache.trees.root / folder).iterdir()), folder


if __name__ == "__main__":
    main(Path(sys.argv[1]))
