"""Dockerfiles by chance, built by BuildKit and by firebuild."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from assurance.trials import Effort, trial
from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.home import Home
from oracle import ours
from oracle.chance import by_chance
from oracle.corpus import Case, bases
from oracle.daemon import BuildKit
from oracle.record import Ask, outcome
from oracle.tree import Tree, without_base

# What BuildKit does not find: a pattern's directory that nothing else has it read, / with --parents, a user.
_NOT_FOR_BUILDKIT: Final = re.compile(r'"[^"]*": not found|lstat /|invalid user index|unable to find user')
# What is refused on purpose (disagreements.yaml).
_NOT_FOR_US: Final = re.compile(r"needs a destination that ends in|of the image (has no|does not exist)")


class Comparison:
    """BuildKit and a store of firebuild, which build the same."""

    def __init__(self, directory: Path, buildkit: BuildKit) -> None:
        self._directory = directory
        layouts = {name: directory / "images" / name for name in bases()}
        self._ask = Ask(
            buildkit, {name: (path, bases()[name].layout(path)) for name, path in layouts.items()}
        )
        (directory / "ours").mkdir()
        self.home: Home = ours.home(directory / "ours")

    def count(self, case: Case, counts: Counter[str]) -> None:
        """Compare, and count how it ended; raises as `compare`."""
        counts[self.compare(case)] += 1

    def compare(self, case: Case) -> str:
        """Build a case by both, and ours from the cache as well; returns how it ended.

        Raises:
            AssertionError: they made something else of it.
        """
        directory = self._directory / case.name
        try:
            theirs, mine = (
                outcome(case, directory / "theirs", self._ask),
                self._ours(case, directory / "ours"),
            )
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if "refused" in theirs and "refused" in mine:
            return "refused by both"
        if _NOT_FOR_BUILDKIT.search(theirs.get("refused", "")) or _NOT_FOR_US.search(mine.get("refused", "")):
            return "refused by one, on purpose"
        assert not (found := list(_different(theirs, mine))), "\n".join([*found, repr(case)])
        return "built alike"

    def _ours(self, case: Case, directory: Path) -> dict[str, Any]:
        case.lay(directory)
        try:
            config = ours.plan(case, directory, case.args)
            tree = self._tree(case, directory, cached=False)
        except FirebuildError as error:
            return {"refused": str(error)}
        for _ in range(2):  # the first puts into the cache what the second finds there
            again = self._tree(case, directory, cached=True)
            assert again == tree, "\n".join(
                ["from the cache:", *_different({"tree": tree}, {"tree": again}), repr(case)]
            )
        return {"config": config, "tree": tree}

    def _tree(self, case: Case, directory: Path, *, cached: bool) -> Tree:
        return without_base(ours.build(case, directory, case.args, self.home, cached=cached))


def _different(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    if "refused" in one or "refused" in other:
        yield f"theirs: {one.get('refused', 'built')}, ours: {other.get('refused', 'built')}"
        return
    for part, members in one.items():
        for name in sorted({*members, *other[part]}):
            if members.get(name) != other[part].get(name):
                yield f"{part} {name}: {members.get(name)!r}, ours: {other[part].get(name)!r}"


@trial(
    "dockerfiles-by-chance",
    "Dockerfiles by chance, built by BuildKit and by firebuild, and from firebuild's cache",
    needs=("root", "userns", "busybox", "runc", "buildkit"),
    in_suite=False,
)
def differences(effort: Effort) -> None:
    """Compare one case after the other."""
    (effort.directory / "daemon").mkdir()
    seed = effort.seed * 1_000_000
    with BuildKit(effort.directory / "daemon") as buildkit:
        comparison = Comparison(effort.directory, buildkit)
        try:
            while effort.goes_on():
                seed += 1
                case = by_chance(seed)
                effort.attempt("Dockerfile", partial(comparison.count, case, effort.counts))
        finally:
            comparison.home.close()
