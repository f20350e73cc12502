"""Builds, clean-ups and prunes of one cache that are killed at any moment, side by side.

A program of its own: it forks, which a process with threads must not.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.machine.base import FINISHED
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.solve.cache import Cache, new_id
from firebuild_bootstrap.solve.rescue import Plan, PlannedStep, rescue
from solve.stores import key, layer, layer_trees, runtime, sandbox


def build(home: Path, say: int) -> None:
    """Finish chains of steps for ever, and say which are; what is finished is committed at the end."""
    for turn in itertools.count():
        trees = layer_trees(home)
        cache = Cache(trees)
        chain = [key(f"{turn % 5}{depth}") for depth in range(4)]
        entries = cache.find(chain)
        directory = home / "builds" / f"{os.getpid()}-{turn}"
        (directory / FINISHED).mkdir(parents=True)
        steps: list[PlannedStep] = []
        for number, each in list(enumerate(chain))[len(entries) :]:
            parent = steps[-1].identity if steps else entries[-1].id if entries else ""
            steps.append(PlannedStep(number, each, new_id(each), parent, "", each))
        workspace = BuildDirectory(
            directory, sandbox(), runtime(), check=lambda: None, tasks=Tasks(), home=home
        )
        plan = Plan(workspace, home, steps, replace=False)
        for step in steps:
            made = layer(home, f"{os.getpid()}-{turn}/unfinished", step.key)
            os.rename(made, directory / FINISHED / str(step.number))
            os.write(say, f"{step.key}\n".encode())
        for step in steps:
            entries.append(step.commit(cache, directory / FINISHED / str(step.number), replace=False))
        plan.close()
        assert [(entry.path / "file").read_text() for entry in entries] == chain
        trees.close()
        remove_tree(directory)
        os.write(say, b"\n")


def clean_up(home: Path, say: int) -> None:
    """Do what is done after a kill."""
    for plan in sorted(home.glob("builds/*/plan")):
        with suppress(FirebuildError, OSError, ValueError):  # the first step that is not finished
            rescue(plan)
        os.write(say, b"\n")
    os.write(say, b"\n" * 100)
    signal.pause()


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
            except BaseException:
                traceback.print_exc()
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
        helpers = [Worker(clean_up, home) for _ in range(2)]
        for helper, lines in zip(helpers, (chance.randrange(5), 100), strict=True):
            helper.wait(lines)
        for helper in helpers:
            helper.kill()
        there = consistent(home)
        for directory in (home / "builds").iterdir():
            remove_tree(directory)
        assert prune in works or set().union(*finished) <= there
    cache = Cache(layer_trees(home))
    cache.prune(everything=True)
    for folder in ("cache/keys", "cache/records", "content", "names", "staging"):
        assert not list((cache.trees.root / folder).iterdir()), folder


if __name__ == "__main__":
    main(Path(sys.argv[1]))
