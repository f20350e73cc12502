"""ONBUILD triggers of the base image."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Plan, Read
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


# --- ONBUILD in a Dockerfile -----------------------------------------------------------------------


def test_triggers_are_kept_as_they_are_written(read: Read) -> None:
    config = read(
        "FROM scratch\nONBUILD RUN echo $v\nonbuild   COPY a   /b\nONBUILD ENV a=$b\n"
        "ONBUILD COPY <<EOF /x\ntext\nEOF\nONBUILD RUN make \\\n  all\n"
        "RUN <<EOF\nONBUILD COPY <<X /y\nEOF\n"
    ).target.config
    assert config.onbuild == (
        "RUN echo $v",
        "COPY a   /b",
        "ENV a=$b",
        "COPY <<EOF /x\ntext\nEOF",
        "RUN make   all",
    )


def test_a_stage_executes_the_triggers_of_the_stage_it_begins_with_and_of_no_other(read: Read) -> None:
    graph = read(
        "FROM scratch AS tool\nFROM scratch AS one\nONBUILD COPY --from=tool a b\nONBUILD RUN one\n"
        "FROM one AS two\nONBUILD ENV A=$B\nFROM two AS three\nARG B=1\nCOPY x y\n"
    )
    assert [stage.name for stage in graph.stages] == ["tool", "one", "two", "three"]
    one, two, three = graph.stages[1:]
    assert one.steps == ()
    assert [(step.origin.text, step.origin.location.line, step.origin.base) for step in two.steps] == [
        ("COPY --from=tool a b", 5, "the stage 'one'"),
        ("RUN one", 5, "the stage 'one'"),
    ]
    assert [stage.config.onbuild for stage in (one, two, three)] == [
        ("COPY --from=tool a b", "RUN one"),
        ("ENV A=$B",),
        (),
    ]
    # Triggers come before the stage's own instructions.
    assert (three.config.env["A"], [step.origin.text for step in three.steps]) == ("", ["COPY x y"])


@pytest.mark.parametrize("text", ["FROM x", "from x", "MAINTAINER m", "ONBUILD RUN x", "  onbuild RUN x"])
def test_what_cannot_be_a_trigger_is_refused(read: Read, text: str) -> None:
    with pytest.raises(InputError, match="can't be a trigger"):
        read(f"FROM scratch\nONBUILD {text}\n")


def test_an_empty_onbuild_is_an_error(read: Read) -> None:
    with pytest.raises(InputError, match="ONBUILD: expected an instruction"):
        read("FROM scratch\nONBUILD\n")


@pytest.mark.parametrize("text", ["FROBNICATE x", "COPY --colour=red a b"])
def test_a_trigger_that_will_fail_is_kept_with_a_warning(read: Read, text: str) -> None:
    graph = read(f"FROM scratch\nONBUILD {text}\n")
    assert graph.target.config.onbuild == (text,)
    (warning,) = graph.warnings
    assert warning.message.startswith(f"no image can be built on this one: ONBUILD {text}: unknown ")


def test_several_instructions_are_no_trigger(plan: Plan, bases: Bases) -> None:
    bases.images["parent"] = ImageConfig(onbuild=("RUN a\nRUN b",))
    with pytest.raises(InputError, match="a trigger is a single instruction"):
        plan("FROM parent\n")
