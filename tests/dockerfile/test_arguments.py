"""ARG, build arguments, and NAME=VALUE on the command line."""

from __future__ import annotations

import pytest

from dockerfile.planning import Bases, Plan, Planned
from firebuild_bootstrap.dockerfile import parse_assignments
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.image.config import ImageConfig
from firebuild_bootstrap.image.platforms import host_platform, normal_platform
from firebuild_bootstrap.wire import DEFAULT_PATH, RunCommand


def run_of(made: Planned) -> RunCommand:
    command = made.steps[-1].command
    assert isinstance(command, RunCommand)
    return command


def test_an_arg_comes_into_effect_at_its_line_and_never_lands_in_the_image(plan: Plan) -> None:
    made = plan("FROM scratch\nLABEL a=${V:-none}\nARG V=default\nLABEL b=$V\nRUN true\n")
    assert made.config.labels == {"a": "none", "b": "default"}
    assert made.config.env == {"PATH": DEFAULT_PATH}
    assert run_of(made).args == {"V": "default"}


def test_a_build_argument_beats_the_default(plan: Plan) -> None:
    made = plan("FROM scratch\nARG V=default W\nRUN true\n", build_args={"V": "given", "W": ""})
    assert run_of(made).args == {"V": "given", "W": ""}
    assert not made.warnings


def test_a_build_argument_without_value_counts_as_not_given(plan: Plan) -> None:
    made = plan("FROM scratch\nARG V=default\nRUN true\n", build_args={"V": None})
    assert run_of(made).args == {"V": "default"}


@pytest.mark.parametrize(
    ("lines", "given", "seen"),
    [
        ("ENV V=env|ARG V=arg", None, "arg"),
        ("ENV V=env|ARG V=arg", "given", "given"),
        ("ENV V=env|ARG V", "given", "given"),
        ("ENV V=env|ARG V", None, "env"),
        ("ARG V=arg|ENV V=env", None, "env"),
        ("ARG V=arg|ENV V=env", "given", "env"),
        ("ARG V|ENV V=env", "given", "env"),
        ("ARG V=arg|ENV V=${V}x", None, "argx"),
        ("ENV V=env|ARG V=${V}x", None, "envx"),
        ("ARG V=arg|ENV V=env|ARG V", "given", "given"),
        ("ARG V=arg|ENV V=env|ARG V", None, "env"),
        ("ENV V=env|ARG V=", None, ""),
        ("ENV V=env|ARG V", "", ""),
    ],
)
def test_of_env_and_arg_the_later_one_with_a_value_wins(
    plan: Plan, lines: str, given: str | None, seen: str
) -> None:
    text = lines.replace("|", "\n")
    made = plan(f"FROM scratch\n{text}\nLABEL l=$V\nRUN true\n", build_args={"V": given})
    assert made.config.labels == {"l": seen}
    assert {**run_of(made).args, **run_of(made).env}["V"] == seen
    if "ENV" in lines:
        assert made.config.env["V"] == ("argx" if "{V}x" in lines and "ENV V=$" in lines else "env")


@pytest.mark.parametrize(
    ("text", "given", "seen"),
    [("ARG V", "given", "given"), ("ARG V=arg", None, "arg"), ("ARG V", None, "upstream")],
)
def test_an_arg_beats_a_variable_of_the_base_image(
    plan: Plan, bases: Bases, text: str, given: str | None, seen: str
) -> None:
    bases.images["base"] = ImageConfig(env={"V": "upstream"})
    made = plan(f"FROM base\n{text}\nENV COPY=$V\nRUN true\n", build_args={"V": given})
    assert {**run_of(made).args, **run_of(made).env}["V"] == seen
    assert (made.config.env["V"], made.config.env["COPY"]) == ("upstream", seen)


def test_an_arg_before_from_beats_a_variable_of_the_base_image_once_it_is_redeclared(
    plan: Plan, bases: Bases
) -> None:
    bases.images["base"] = ImageConfig(env={"V": "upstream"})
    made = plan("ARG V=global\nFROM base\nLABEL a=$V\nARG V\nLABEL b=$V\n")
    assert made.config.labels == {"a": "upstream", "b": "global"}


def test_a_default_is_expanded_only_where_it_is_needed(plan: Plan) -> None:
    text = "FROM scratch\nARG V=${missing:?no-value}\nRUN true\n"
    assert run_of(plan(text, build_args={"V": "given"})).args == {"V": "given"}
    with pytest.raises(InputError, match="missing: no-value"):
        plan(text)


def test_a_proxy_argument_yields_to_a_variable_of_its_name(plan: Plan) -> None:
    made = plan("FROM scratch\nENV http_proxy=env\nRUN true\n", build_args={"http_proxy": "given"})
    assert (run_of(made).args, run_of(made).env["http_proxy"]) == ({}, "env")


def test_what_is_predefined_before_from_can_be_given(plan: Plan) -> None:
    made = plan(
        "FROM scratch AS Last\nARG TARGETARCH TARGETSTAGE\nLABEL a=$TARGETARCH s=$TARGETSTAGE\n",
        build_args={"TARGETARCH": "mine", "BUILDOS": "theirs"},
    )
    assert made.config.labels == {"a": "mine", "s": "last"}
    assert not made.warnings


def test_an_env_may_take_its_value_from_an_arg(plan: Plan) -> None:
    assert plan("FROM scratch\nARG V=1\nENV W=v$V\n").config.env["W"] == "v1"


def test_later_args_see_earlier_ones_even_on_one_line(plan: Plan) -> None:
    assert run_of(plan('FROM scratch\nARG A=1 B=$A-2 C="$A 3"\nRUN true\n')).args == {
        "A": "1",
        "B": "1-2",
        "C": "1 3",
    }


def test_the_last_declaration_wins_and_a_bare_one_keeps_the_value(plan: Plan) -> None:
    assert run_of(plan("FROM scratch\nARG A=1\nARG A=2\nARG A\nRUN true\n")).args == {"A": "2"}


def test_an_arg_before_from_is_for_from_only(plan: Plan) -> None:
    made = plan("ARG B=scratch\nFROM $B\nLABEL a=${B:-unset}\nRUN true\n")
    assert made.config.labels == {"a": "unset"}
    assert run_of(made).args == {}


def test_an_arg_before_from_is_the_default_of_a_bare_redeclaration(plan: Plan) -> None:
    made = plan("ARG B=1\nARG C=$B.0\nFROM scratch\nARG C\nARG B=2\nRUN true\n")
    assert run_of(made).args == {"C": "1.0", "B": "2"}


def test_a_build_argument_reaches_an_arg_before_from(plan: Plan) -> None:
    made = plan("ARG B=nothing\nFROM $B\n", build_args={"B": "scratch"})
    assert made.base == "scratch"
    assert not made.warnings


def test_an_undeclared_build_argument_is_a_warning_that_keeps_the_value_secret(plan: Plan) -> None:
    made = plan("FROM scratch\nRUN true\n", build_args={"TOKEN": "s3cret"})
    assert [each.message for each in made.warnings] == [
        "the build argument TOKEN is not declared by any ARG, so nothing uses it"
    ]
    assert run_of(made).args == {}
    assert "s3cret" not in repr(made)


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "no_proxy", "ALL_PROXY", "ftp_proxy"])
def test_proxy_arguments_are_predefined_for_run_and_nowhere_else(plan: Plan, name: str) -> None:
    made = plan(f"FROM scratch\nLABEL a=${{{name}:-unset}}\nRUN true\n", build_args={name: "http://proxy"})
    assert run_of(made).args == {name: "http://proxy"}
    assert made.config.labels == {"a": "unset"}
    assert "proxy" not in str(made.config.env)
    assert not made.warnings


def test_the_platform_is_predefined_before_from_and_by_redeclaration(plan: Plan) -> None:
    made = plan(
        "FROM --platform=$BUILDPLATFORM scratch\nLABEL a=${TARGETARCH:-unset}\n"
        "ARG TARGETARCH TARGETVARIANT TARGETOS\nLABEL b=$TARGETOS/$TARGETARCH/$TARGETVARIANT\n",
        platform="linux/arm/v7",
    )
    assert made.config.labels == {"a": "unset", "b": "linux/arm/v7"}


@pytest.mark.parametrize("text", ["ARG =x", "ARG $unset=1", "ARG 'a"])
def test_an_arg_without_a_name_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\n{text}\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_this_hosts_platform_is_written_as_docker_does() -> None:
    assert host_platform("x86_64") == "linux/amd64"
    assert host_platform("riscv64") == "linux/riscv64"
    assert host_platform().startswith("linux/")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("linux/amd64", "linux/amd64"),
        ("amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("Linux", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/9", "linux/arm64/v9"),
        ("armhf", "linux/arm/v7"),
        ("linux/arm/6", "linux/arm/v6"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/amd64/v2", "linux/amd64/v2"),
        ("linux(6.1+feature)/amd64", "linux(6.1+feature)/amd64"),
        ("windows", "windows/amd64"),
        ("aarch64", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("windows/amd64", "windows/amd64"),
    ],
)
def test_platforms_have_several_spellings(text: str, normal: str) -> None:
    assert normal_platform(text, "linux/amd64") == normal


def test_assignments_are_read_as_docker_reads_them() -> None:
    assert parse_assignments(["A=1", "B=", "C", "D=x=y", "A=2"], "--build-arg") == {
        "A": "2",
        "B": "",
        "C": None,
        "D": "x=y",
    }


def test_an_assignment_without_a_name_is_an_error_that_keeps_the_value_secret() -> None:
    with pytest.raises(InputError, match="--build-arg: expected NAME=VALUE") as caught:
        parse_assignments([" =s3cret"], "--build-arg")
    assert "s3cret" not in str(caught.value)
