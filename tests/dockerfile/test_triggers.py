"""ONBUILD triggers of the base image."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Plan
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.lowering import WireStep
from firebuild_bootstrap.wire import (
    RunCommand,
)


def run_of(step: WireStep) -> RunCommand:
    assert isinstance(step.command, RunCommand)
    return step.command


def test_the_triggers_of_the_base_are_executed_right_after_from(plan: Plan, bases: Bases) -> None:
    bases.images["parent"] = ImageConfig(onbuild=("COPY f /app/", "ENV A=1", "ARG V=2", "RUN make $V"))
    made = plan("ARG V=9\n\nFROM parent\nRUN own\n", files={"f": "x"}, build_args={"V": "3"})
    assert [(step.number, step.line, step.instruction) for step in made.steps] == [
        (2, 3, "COPY f /app/"),
        (3, 3, "RUN make $V"),
        (4, 4, "RUN own"),
    ]
    assert run_of(made.steps[1]).args == {"V": "3"}
    assert (made.config.env["A"], made.config.onbuild) == ("1", ())


@pytest.mark.parametrize(
    "trigger", ["COPY missing /", "FROM x", "ONBUILD RUN x", "MAINTAINER m", "NOTHING", "", "STOPSIGNAL $u"]
)
def test_a_failing_trigger_is_reported_at_from_and_by_its_text(
    plan: Plan, bases: Bases, trigger: str
) -> None:
    bases.images["parent"] = ImageConfig(onbuild=(trigger,))
    with pytest.raises(InputError) as caught:
        plan("\nFROM parent\n")
    assert caught.value.message.startswith(f"in the ONBUILD trigger {trigger!r} of parent: ")
    assert caught.value.location == Location("Dockerfile", 2)


def test_triggers_are_read_with_a_backslash_whatever_the_dockerfile_says(plan: Plan, bases: Bases) -> None:
    bases.images["parent"] = ImageConfig(onbuild=("LABEL a=x\\ y",))
    made = plan("# escape=`\nFROM parent\nLABEL b=x` y\n")
    assert made.config.labels == {"a": "x y", "b": "x y"}
