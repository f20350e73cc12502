"""Stages run after those that they need, side by side where they do not need each other."""

from __future__ import annotations

import threading

import pytest

from firebuild_bootstrap.dockerfile.graph import (
    BindMount,
    Copy,
    Files,
    Origin,
    Run,
    Scratch,
    Stage,
    StageRef,
    Step,
    TreeRef,
)
from firebuild_bootstrap.errors import InputError, Location, StageCancelled
from firebuild_bootstrap.solve.schedule import Schedule, needs

HERE = Origin(Location("Dockerfile", 1), "FROM scratch")


def stage(index: int, *needed: int, base: TreeRef = Scratch()) -> Stage:  # noqa: B008 - frozen
    steps = tuple(Step(Copy(sources=(Files("a", StageRef(each)),), destination="/"), HERE) for each in needed)
    return Stage(index=index, base=base, origin=HERE, platform="linux/amd64", steps=steps)


def test_a_stage_needs_its_base_the_sources_of_its_copies_and_its_mounts() -> None:
    mounted = Step(Run(argv=("true",), mounts=(BindMount("/m", StageRef(2)),)), HERE)
    built = stage(3, 1, base=StageRef(0))
    assert needs(built) == {0, 1}
    every = Stage(index=3, base=Scratch(), origin=HERE, platform="", steps=(*built.steps, mounted))
    assert needs(every) == {1, 2}


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_every_stage_comes_after_those_that_it_needs(at_once: int) -> None:
    stages = [stage(0), stage(1), stage(2, 0), stage(4, 1, 2), stage(5, 0, 4)]
    done: list[int] = []

    def work(built: Stage) -> None:
        assert needs(built) <= set(done)
        done.append(built.index)

    Schedule(at_once).run(stages, work)
    assert sorted(done) == [0, 1, 2, 4, 5]


def test_stages_that_do_not_need_each_other_run_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=60)

    def work(built: Stage) -> None:
        if built.index < 2:
            together.wait()

    Schedule(2).run([stage(0), stage(1), stage(2, 0, 1)], work)


def test_no_more_stages_than_allowed_run_at_the_same_time() -> None:
    running, most = set[int](), 0
    lock = threading.Lock()

    def work(built: Stage) -> None:
        nonlocal most
        with lock:
            running.add(built.index)
            most = max(most, len(running))
        with lock:
            running.remove(built.index)

    Schedule(2).run([stage(index) for index in range(12)], work)
    assert most <= 2


def test_the_first_failure_ends_the_others_and_is_what_is_raised() -> None:
    schedule = Schedule(3)
    cancelled, begun = [], threading.Event()

    def work(built: Stage) -> None:
        if built.index == 0:
            begun.wait(60)
            raise InputError("this is why")
        if built.index == 2:
            pytest.fail("it needs what has failed")
        begun.set()
        while True:
            try:
                schedule.check()
            except StageCancelled:
                cancelled.append(built.index)
                raise

    with pytest.raises(InputError, match="this is why"):
        schedule.run([stage(0), stage(1), stage(2, 0)], work)
    assert cancelled == [1]
    schedule.check()  # what is cleaned up afterwards is not disturbed
