"""What stages start from."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from firebuild_bootstrap.dockerfile.graph import (
    Copy,
    Files,
    Graph,
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
from firebuild_bootstrap.image.layertrees import StoredLayer
from firebuild_bootstrap.solve.cache import Cache
from firebuild_bootstrap.solve.inputs import Inputs
from firebuild_bootstrap.solve.keys import keys_of
from firebuild_bootstrap.solve.results import Results, Shared
from solve.stores import PlainTrees, layer, layer_trees


def stage(index: int, base: TreeRef, *operations: Operation) -> Stage:
    origin = Origin(Location("Dockerfile", 1), "TEXT")
    steps = tuple(Step(each, origin) for each in operations)
    return Stage(index=index, base=base, origin=origin, platform="linux/amd64", steps=steps)


def take(index: int) -> Copy:
    return Copy(sources=(Files("/x", StageRef(index)),), destination="/")


def test_all_stages_of_a_build_start_from_one_result_whatever_other_builds_make(tmp_path: Path) -> None:
    graph = Graph(
        stages=(
            stage(0, Scratch(), Run(argv=("a",))),
            stage(1, StageRef(0), Run(argv=("b",))),
            stage(2, StageRef(0)),
            stage(3, StageRef(2), Run(argv=("c",))),
            stage(4, Scratch(), take(1), take(3)),
        )
    )
    keys = keys_of(graph, Inputs({}, {}, {}, tmp_path / "stat"))
    with closing(layer_trees(tmp_path)) as stored, closing(layer_trees(tmp_path)) as others:
        other = Cache(others)
        first = other.commit(keys[0].key, layer(tmp_path, "a1", "first"))
        results = Results(
            graph,
            {},
            shared=Shared(
                cache=Cache(stored),
                keys=keys,
                fresh=lambda _: False,
                unchanged=lambda *_: True,
                notice=lambda _: None,
            ),
            stored=stored,
            trees=PlainTrees(),
            directory=lambda: tmp_path,
        )
        assert [each.index for each in results.pending()] == [1, 3, 4]
        again = other.commit(keys[0].key, layer(tmp_path, "a2", "second"), replace=True)
        other.commit(keys[1].key, layer(tmp_path, "b2", "on the second"), parent=again)
        on_first = other.commit(
            keys[3].key, layer(tmp_path, "c1", "on the first"), parent=first, replace=True
        )
        for index in (1, 3):
            start = results.start(graph.stage(index))
            assert start.layers[0] == StoredLayer(first.id)
            assert [each.id for each in start.tip] == [first.id if index == 1 else on_first.id]
            assert start.done == len(start.layers) - 1 == (0 if index == 1 else 1)
