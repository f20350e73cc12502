"""ARG, build arguments, and NAME=VALUE on the command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from firebuild_bootstrap.dockerfile import BuildPlan, parse_assignments
from firebuild_bootstrap.dockerfile.variables import host_platform, normal_platform
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.wire import DEFAULT_PATH, RunCommand

Plan = Callable[..., BuildPlan]


def run_of(made: BuildPlan) -> RunCommand:
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


def test_env_beats_arg_before_and_after(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nENV V=env\nARG V=arg\nLABEL l=$V\nARG W=arg\nENV W=env\nRUN true\n",
        build_args={"V": "given"},
    )
    assert made.config.labels == {"l": "env"}
    assert run_of(made).env["W"] == "env"
    assert run_of(made).args == {}


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
        ("", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64"),
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
