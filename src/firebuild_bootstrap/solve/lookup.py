"""Which stages of a build are needed, and how much of them is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from firebuild_bootstrap.dockerfile.graph import Graph, ImageRef, Stage, StageRef, TreeRef, trees_of
from firebuild_bootstrap.solve.cache import Cache, Entry
from firebuild_bootstrap.solve.keys import StageKeys


@dataclass(frozen=True)
class Found:
    """How much of a stage is in the cache.

    Args:
        entries: layers that are there, those of the stages below included, the lowest first. All are held.
        first: place of the first step of the stage that has to be executed; all of them are cached if it is
            their number.
        complete_below: the stage below is there, as far as there is one.
    """

    entries: tuple[Entry, ...]
    first: int
    complete_below: bool = True


class Lookup:
    """Looks the stages of one build up.

    Args:
        graph: what there is to do.
        keys: of its stages, from `keys_of`.
        cache: where results are.
        digest: returns the digest of an image that is a base.
        fresh: indices of stages whose steps are executed whatever the cache has, and with them all that is
            made of these stages.
    """

    def __init__(
        self,
        graph: Graph,
        keys: Mapping[int, StageKeys],
        cache: Cache,
        digest: Callable[[ImageRef], str],
        fresh: Collection[int] = frozenset(),
    ) -> None:
        self._graph = graph
        self._keys = keys
        self._cache = cache
        self._digest = digest
        self._fresh = fresh
        self._usable = self._usable_keys()

    def wanted(self) -> dict[int, Found]:
        """Return the stages that the build needs, by their indices: the target, and what its steps need.

        A stage that only steps take files from which are cached themselves is not needed.
        """
        needed = {self._graph.target.index}
        found: dict[int, Found] = {}
        for stage in reversed(self._graph.stages):
            if stage.index not in needed:
                continue
            here = found[stage.index] = self._found(stage, self._usable[stage.index])
            if not here.complete_below and isinstance(stage.base, StageRef):
                needed.add(stage.base.index)
            for step in stage.steps[here.first :]:
                needed |= {tree.index for tree in trees_of(step.operation) if isinstance(tree, StageRef)}
        return dict(reversed(found.items()))

    def of(self, stage: Stage) -> Found:
        """Look one stage up once the stages that it needs are done: what was made anew of them counts now."""
        steps = 0 if stage.index in self._fresh else len(stage.steps)
        return self._found(stage, self._below(stage) + steps)

    def _found(self, stage: Stage, usable: int) -> Found:
        entries = self._cache.find(self._keys[stage.index].chain[:usable], self.base(stage))
        below = self._below(stage)
        return Found(tuple(entries), max(len(entries) - below, 0), complete_below=len(entries) >= below)

    def _below(self, stage: Stage) -> int:
        return len(self._keys[stage.index].chain) - len(stage.steps)

    def base(self, stage: Stage) -> str:
        """Return the digest of what the first of the stages below a stage lies on; empty for nothing."""
        tree: TreeRef = stage.base
        while isinstance(tree, StageRef):
            tree = self._graph.stage(tree.index).base
        return self._digest(tree) if isinstance(tree, ImageRef) else ""

    def _usable_keys(self) -> dict[int, int]:
        """Return for each stage how many keys of its chain may be looked up before its needs are done."""
        usable: dict[int, int] = {}
        anew: set[int] = set()  # stages that are not what they were, at least in part
        for stage in self._graph.stages:
            steps = 0 if stage.index in self._fresh else _until(stage, anew)
            if isinstance(stage.base, StageRef) and stage.base.index in anew:
                usable[stage.index] = usable[stage.base.index]
                anew.add(stage.index)
            else:
                usable[stage.index] = self._below(stage) + steps
                if steps < len(stage.steps):
                    anew.add(stage.index)
        return usable


def _until(stage: Stage, anew: Collection[int]) -> int:
    """Return how many of the steps come before the first that takes files from one of these stages."""
    for place, step in enumerate(stage.steps):
        if any(isinstance(tree, StageRef) and tree.index in anew for tree in trees_of(step.operation)):
            return place
    return len(stage.steps)
