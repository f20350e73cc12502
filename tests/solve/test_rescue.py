"""What becomes of the finished steps of a dead build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image import layertrees
from firebuild_bootstrap.machine.base import FINISHED
from firebuild_bootstrap.machine.leftovers import clear
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.solve.cache import Cache, new_id
from firebuild_bootstrap.solve.rescue import Plan, PlannedStep, rescue
from solve.stores import key, layer, layer_trees, runtime, sandbox


class DeadBuild:
    """A build of three steps, the second of which takes files; those named are finished."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.directory = home / "builds" / "dead"
        (self.directory / FINISHED).mkdir(parents=True)
        steps: list[PlannedStep] = []
        for number, name in enumerate("abc", 2):
            parent = steps[-1].identity if steps else ""
            sure = name != "b"
            steps.append(
                PlannedStep(number, key(name), new_id(key(name)), parent, "", f"RUN {name}", sure=sure)
            )
        self.workspace = BuildDirectory(
            self.directory, sandbox(), runtime(), check=lambda: None, tasks=Tasks(), home=home
        )
        self.plan = Plan(self.workspace, home, steps, replace=False)

    def finish(self, *numbers: int) -> None:
        for number in numbers:
            os.rename(layer(self.home, "making", "x"), self.directory / FINISHED / str(number))

    def cached(self) -> int:
        trees = layer_trees(self.home)
        found = len(Cache(trees).find([key(name) for name in "abc"]))
        trees.close()
        return found


@pytest.fixture
def dead(tmp_path: Path) -> DeadBuild:
    return DeadBuild(tmp_path)


def test_steps_are_saved_up_to_the_first_that_is_not_finished(dead: DeadBuild) -> None:
    dead.finish(2, 4)
    dead.plan.sure(3)
    with pytest.raises(FirebuildError, match="the cache can't be written"):
        rescue(dead.directory / "plan")
    assert dead.cached() == 1
    assert len(list(dead.home.glob("layers/*/cache/keys/*"))) == 1
    dead.finish(3)
    rescue(dead.directory / "plan")
    assert dead.cached() == 3
    rescue(dead.directory / "plan")
    assert dead.cached() == 3


def test_a_step_whose_files_may_be_others_by_now_is_not_saved(dead: DeadBuild) -> None:
    dead.finish(2, 3, 4)
    rescue(dead.directory / "plan")
    assert dead.cached() == 1


def test_nothing_is_saved_after_a_power_failure(
    dead: DeadBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead.finish(2)
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(layertrees, "_BOOT_ID", tmp_path / "boot")
    rescue(dead.directory / "plan")
    assert dead.cached() == 0


def test_whoever_clears_the_directory_saves_them_unless_the_build_has(dead: DeadBuild) -> None:
    dead.finish(2)
    assert clear(dead.directory) == []
    assert dead.cached() == 1
    other = DeadBuild(dead.home / "other")
    other.finish(2)
    other.plan.close()
    assert clear(other.directory) == []
    assert other.cached() == 0


def test_a_plan_that_cannot_be_written_is_an_error(dead: DeadBuild) -> None:
    (dead.directory / "plan").unlink()
    (dead.directory / "plan").mkdir()
    with pytest.raises(MachineError, match="Is a directory"):
        Plan(dead.workspace, dead.home, [], replace=False)
    dead.plan.sure(2)
