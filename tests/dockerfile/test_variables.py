"""Variables: operators, which instructions expand them, and where their values come from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.dockerfile import BuildPlan, parse_assignments
from firebuild_bootstrap.dockerfile.variables import host_platform, normal_platform
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.wire import DEFAULT_PATH, CopyCommand, RunCommand

Plan = Callable[..., BuildPlan]

_OPERATORS = [
    ("$v", "value"),
    ("${v}", "value"),
    ("$v-x", "value-x"),
    ("${v}x", "valuex"),
    ("$unset", ""),
    ("a${unset}b", "ab"),
    ("${v:-d}", "value"),
    ("${unset:-d}", "d"),
    ("${empty:-d}", "d"),
    ("${empty-d}", ""),
    ("${unset-d}", "d"),
    ("${unset:-$v}", "value"),
    ("${unset:-${v}s}", "values"),
    ("${v:+d}", "d"),
    ("${empty:+d}", ""),
    ("${empty+d}", "d"),
    ("${unset+d}", ""),
    ("${v:?gone}", "value"),
    ("${empty?gone}", ""),
    ("${path#*/}", "b/c.tar.gz"),
    ("${path##*/}", "c.tar.gz"),
    ("${path%.*}", "a/b/c.tar"),
    ("${path%%.*}", "a/b/c"),
    ("${path/b/X}", "a/X/c.tar.gz"),
    ("${v/e/E}", "valuE"),
    ("${path//a/A}", "A/b/c.tAr.gz"),
    ("${v#?}", "alue"),
    ("\\$v", "$v"),
    ("\\\\", "\\"),
    ("'$v'", "$v"),
    ('"$v"', "value"),
    ('"it\'s $v"', "it's value"),
    ("'a b'", "a b"),
    ("a\\ b", "a b"),
    ("$", "$"),
    ("${v}${v}", "valuevalue"),
    ("$1", ""),
    ("ünï$v", "ünïvalue"),
]


@pytest.mark.parametrize(("word", "result"), _OPERATORS)
@pytest.mark.parametrize("keyword", ["ENV", "LABEL"])
def test_the_operators_of_variables(plan: Plan, keyword: str, word: str, result: str) -> None:
    made = plan(f"FROM scratch\nENV v=value empty= path=a/b/c.tar.gz\n{keyword} R={word}\n")
    assert (made.config.env if keyword == "ENV" else made.config.labels)["R"] == result


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("${unset:?no-$v}", "unset: no-value"),
        ("${unset?}", "is not allowed to be unset"),
        ("${empty:?}", "is not allowed to be empty"),
        ("${v", "missing '}'"),
        ("${}", "bad substitution"),
        ("${v!x}", "unsupported modifier"),
        ("'open", "single-quote"),
    ],
)
def test_a_failing_substitution_is_an_error_at_its_line(plan: Plan, word: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\nENV v=value empty=\nENV R={word}\n")
    assert message in caught.value.message
    assert caught.value.location == Location("Dockerfile", 3)


def test_a_failing_substitution_in_expose_is_an_error_at_its_line(plan: Plan) -> None:
    with pytest.raises(InputError, match="missing '}'") as caught:
        plan("FROM scratch\nEXPOSE ${v\n")
    assert caught.value.location == Location("Dockerfile", 2)


_NAMES = st.sampled_from(["A", "B", "LONG_NAME1"])
_VALUES = st.text(
    st.characters(codec="ascii", exclude_characters="\\\"'$`<\n\r\0\x0b\x0c\x1c\x1d\x1e\x1f"), max_size=8
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_NAMES, _VALUES, _VALUES)
def test_a_value_comes_out_of_double_quotes_as_it_went_in(
    plan: Plan, name: str, value: str, other: str
) -> None:
    made = plan(f'FROM scratch\nENV {name}="{value}"\nLABEL a="<${name}>{other}" b="${{{name}:-x}}"\n')
    assert made.config.labels == {"a": f"<{value}>{other}", "b": value or "x"}


def test_an_instruction_sees_the_values_from_before_it(plan: Plan) -> None:
    made = plan("FROM scratch\nENV abc=hello\nENV abc=bye def=$abc\nENV ghi=$abc\n")
    assert made.config.env == {"PATH": DEFAULT_PATH, "abc": "bye", "def": "hello", "ghi": "bye"}


def test_the_old_form_of_env_takes_the_rest_of_the_line(plan: Plan) -> None:
    assert plan("FROM scratch\nENV A one  two=3\n").config.env["A"] == "one  two=3"


def test_variables_are_expanded_in_every_instruction_that_says_so(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nENV d=/data p=80 u=me s=SIGINT k=key f=file o=7:8 m=640\n"
        "LABEL $k=$d\nEXPOSE $p ${p}81/udp\nVOLUME $d\nSTOPSIGNAL $s\nUSER $u\nWORKDIR $d\n"
        "COPY --chown=$o --chmod=$m $f $d/\nADD $f ${d}2\n",
        files={"file": "x"},
    )
    config = made.config
    assert config.labels == {"key": "/data"}
    assert config.exposed_ports == ("80/tcp", "8081/udp")
    assert (config.volumes, config.stop_signal, config.user, config.workdir) == (
        ("/data",),
        "SIGINT",
        "me",
        "/data",
    )
    copy, add = made.steps[1].command, made.steps[2].command
    assert isinstance(copy, CopyCommand)
    assert isinstance(add, CopyCommand)
    assert (copy.target, copy.chown, copy.chmod) == ("/data/", "7:8", "640")
    assert (add.target, add.keyword) == ("/data2", "ADD")


def test_an_exposed_variable_may_hold_several_ports(plan: Plan) -> None:
    made = plan('FROM scratch\nENV ports="80 443/tcp"\nEXPOSE $ports\n')
    assert made.config.exposed_ports == ("80/tcp", "443/tcp")


@pytest.mark.parametrize("keyword", ["CMD", "ENTRYPOINT"])
def test_variables_are_left_to_the_shell_in_commands(plan: Plan, keyword: str) -> None:
    made = plan(f'FROM scratch\nENV v=1\nRUN echo $v \'${{v}}\'\nRUN ["echo", "$v"]\n{keyword} echo $v\n')
    shell, direct = made.steps[0].command, made.steps[1].command
    assert isinstance(shell, RunCommand)
    assert isinstance(direct, RunCommand)
    assert shell.argv == ("/bin/sh", "-c", "echo $v '${v}'")
    assert direct.argv == ("echo", "$v")
    assert (made.config.cmd or made.config.entrypoint) == ("/bin/sh", "-c", "echo $v")


# --- ARG --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("keyword", ["ENV", "LABEL"])
@pytest.mark.parametrize("pair", ["=x", "$unset=x", "a=b c"])
def test_a_pair_without_a_name_or_value_is_an_error(plan: Plan, keyword: str, pair: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\n{keyword} {pair}\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_variable_name_can_not_hold_an_equals_sign(plan: Plan) -> None:
    with pytest.raises(InputError, match="no name of a variable"):
        plan('FROM scratch\nARG N="a=b"\nENV $N=1\n')


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


# --- NAME=VALUE on the command line ------------------------------------------------------------------


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
