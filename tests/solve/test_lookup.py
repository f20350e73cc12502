"""Which stages a build needs, and how much of them is there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.dockerfile.graph import (
    Copy,
    Files,
    Graph,
    ImageRef,
    Operation,
    Origin,
    Run,
    Scratch,
    Stage,
    StageRef,
    Step,
    TreeRef,
)
from firebuild_bootstrap.errors import Location
from firebuild_bootstrap.solve.cache import Cache, Entry
from firebuild_bootstrap.solve.keys import StageKeys, keys_of
from firebuild_bootstrap.solve.lookup import Lookup
from solve.stores import layer, layer_trees
from solve.test_keys import Reader

ORIGIN = Origin(Location("Dockerfile", 1), "TEXT")


def run(command: str) -> Run:
    return Run(argv=(command,))


def take(index: int) -> Copy:
    return Copy(sources=(Files("/out", StageRef(index)),), destination="/")


def stage(index: int, base: TreeRef, *operations: Operation) -> Stage:
    steps = tuple(Step(each, ORIGIN) for each in operations)
    return Stage(index=index, base=base, origin=ORIGIN, platform="linux/amd64", steps=steps)


# 0 builds, 1 tests, 2 is the base of 3, which takes from 0; 4 takes from 1.
GRAPH = Graph(
    stages=(
        stage(0, ImageRef("go"), run("build")),
        stage(1, StageRef(0), run("test")),
        stage(2, ImageRef("debian"), run("upgrade")),
        stage(3, StageRef(2), run("user"), take(0), run("end")),
    )
)


class Builder:
    """Builds stages into a store as a conductor does, and tells what was wanted."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.trees = layer_trees(home)
        self.cache = Cache(self.trees)
        self.made = 0

    def lookup(self, graph: Graph, fresh: Collection[int] = ()) -> tuple[Lookup, dict[int, StageKeys]]:
        keys = keys_of(graph, Reader())
        return Lookup(graph, keys, self.cache, lambda image: f"sha256:{image.reference}", fresh), keys

    def build(self, graph: Graph = GRAPH, fresh: Collection[int] = ()) -> dict[int, int]:
        """Return of each stage that was needed the first step that was executed."""
        lookup, keys = self.lookup(graph, fresh)
        wanted = lookup.wanted()
        tips: dict[str, Entry] = {}
        for index in wanted:
            here = graph.stage(index)
            found = lookup.of(here)
            entries = list(found.entries)
            for place, step in list(enumerate(here.steps))[found.first :]:
                parts = keys[index].steps[place]
                self.made += 1
                entries.append(
                    self.cache.commit(
                        parts.key,
                        layer(self.home, str(self.made), step.origin.text),
                        parent=entries[-1] if entries else lookup.base(here),
                        sources=[tips[each.stage] for each in parts.inputs if each.stage in tips],
                        replace=index in fresh,
                    )
                )
            if entries:
                tips[keys[index].key] = entries[-1]
        return {index: found.first for index, found in wanted.items()}

    def forget(self, *indices: int) -> None:
        """Lose the steps of stages."""
        keys = keys_of(GRAPH, Reader())
        for index in indices:
            for parts in keys[index].steps:
                (self.trees.root / "cache" / "keys" / parts.key).unlink()


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[Builder]:
    made = Builder(tmp_path)
    yield made
    made.trees.close()


def test_without_a_cache_all_that_the_target_needs_is_executed(builder: Builder) -> None:
    assert builder.build() == {0: 0, 2: 0, 3: 0}


def test_what_is_cached_whole_needs_no_other_stage(builder: Builder) -> None:
    builder.build()
    assert builder.build() == {3: 3}
    builder.forget(0)
    assert builder.build() == {3: 3}, "what was taken of it is in its own layer"


def test_a_step_that_is_not_cached_needs_the_stages_that_it_takes_from(builder: Builder) -> None:
    builder.build()
    changed = Graph(stages=(*GRAPH.stages[:3], stage(3, StageRef(2), run("another user"), take(0))))
    assert builder.build(changed) == {0: 1, 3: 0}
    builder.forget(2)
    assert builder.build() == {0: 1, 2: 0, 3: 0}


def test_a_stage_that_is_made_anew_makes_all_that_it_goes_into_anew(builder: Builder) -> None:
    builder.build()
    assert builder.build(fresh={0}) == {0: 0, 3: 1}
    assert builder.build() == {3: 3}
    assert builder.build(fresh={2}) == {0: 1, 2: 0, 3: 0}
    assert builder.build() == {3: 3}
    assert builder.build(fresh={3}) == {0: 1, 3: 0}
    assert builder.build(fresh={0, 1, 2, 3}) == {0: 0, 2: 0, 3: 0}


def test_a_stage_without_steps_and_one_on_an_empty_tree_are_looked_up(builder: Builder) -> None:
    graph = Graph(stages=(stage(0, ImageRef("go")), stage(1, Scratch(), take(0))))
    lookup, _ = builder.lookup(graph)
    assert {index: found.first for index, found in lookup.wanted().items()} == {0: 0, 1: 0}
    assert lookup.base(graph.target) == ""
    assert builder.build(graph) == {0: 0, 1: 0}
    assert builder.build(graph) == {1: 1}
