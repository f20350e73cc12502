"""Variables: their operators, and which instructions expand them."""

from __future__ import annotations

import json
from functools import partial

import pytest
from e2b_dockerfile_utils import ShellLex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dockerfile.planning import Plan, Read
from firebuild_bootstrap.dockerfile.expansion import Budget, ExpansionError, Lexer
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.wire import DEFAULT_PATH, CopyCommand, RunCommand

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
_NAMES = st.sampled_from(["A", "B", "LONG_NAME1"])
_VALUES = st.text(
    st.characters(codec="ascii", exclude_characters="\\\"'$`<\n\r\0\x0b\x0c\x1c\x1d\x1e\x1f"), max_size=8
)


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
    assert ("write \\ before a $" in (caught.value.hint or "")) == (
        "is not" not in message and "no-" not in message
    )
    assert caught.value.location == Location("Dockerfile", 3)


def test_a_failing_substitution_in_expose_is_an_error_at_its_line(plan: Plan) -> None:
    with pytest.raises(InputError, match="missing '}'") as caught:
        plan("FROM scratch\nEXPOSE ${v\n")
    assert caught.value.location == Location("Dockerfile", 2)


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
    assert (add.target, add.original[:3]) == ("/data2", "ADD")


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


@pytest.mark.parametrize("keyword", ["ENV", "LABEL"])
@pytest.mark.parametrize("pair", ["=x", "$unset=x", "a=b c"])
def test_a_pair_without_a_name_or_value_is_an_error(plan: Plan, keyword: str, pair: str) -> None:
    with pytest.raises(InputError) as caught:
        plan(f"FROM scratch\n{keyword} {pair}\n")
    assert caught.value.location == Location("Dockerfile", 2)


def test_a_variable_name_can_not_hold_an_equals_sign(plan: Plan) -> None:
    with pytest.raises(InputError, match="is not the name of a variable"):
        plan('FROM scratch\nARG N="a=b"\nENV $N=1\n')


# --- BuildKit's lexer --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("${y//*/X}", "X"),
        ("${y///-}", "-a-b-c-"),
        ("${y/*/X}", "X"),
        ("${y//?/<>}", "<><><>"),
        ("${y#'*'}", "abc"),
        ("${y/#/x}", "abc"),
        ("${star##'*'}", ""),
        ('${star#"*"}', "*x"),
        ("${back#\\\\}", "b"),
        ("${y:-${y:+$y}}", "abc"),
        ("${é}$ß", "acutesharp"),
        ("$1a${1}", "a"),
        ("<<$y", "<<abc"),
        (r'"a\b\$y\"\\"', 'a\\b$y"\\'),
        (r"""${odd##"?\\"}""", "d"),
    ],
)
def test_words_are_what_buildkits_lexer_makes_of_them(text: str, word: str) -> None:
    values = {"y": "abc", "star": "*x", "back": "\\b", "é": "acute", "ß": "sharp", "odd": "o\\d"}
    assert Lexer(text, values, "\\", Budget()).word() == word


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("${y", "missing '}'"),
        ("${", "missing '}'"),
        ("${y:", "missing '}'"),
        ("${y:-", "missing '}'"),
        ("${y/a", "missing '/'"),
        ("${y/a/b", "missing '}'"),
        ("${}", "bad substitution"),
        ("${{y}}", "bad substitution"),
        ("${y!x}", r"unsupported modifier \(!\)"),
        ("${y:#x}", r"unsupported modifier \(:#\)"),
        ("'a", "single-quote"),
        ('"a', "double-quote"),
        ('"a\\', "double-quote"),
        ("${y#\\a}", "invalid escape"),
        ("${x?}", "x: is not allowed to be unset"),
        ("${e:?}", "e: is not allowed to be empty"),
        ("${y:-" * 60 + "}" * 60, "nested more than 50 deep"),
    ],
)
def test_what_can_not_be_expanded_says_why(text: str, why: str) -> None:
    with pytest.raises(ExpansionError, match=why):
        Lexer(text, {"y": "abc", "e": ""}, "\\", Budget()).words()


_PIECES = st.lists(
    st.sampled_from(
        [
            *"ab $xyz_1<",
            "${",
            "}",
            ":-",
            "+",
            ":?",
            "#",
            "%%",
            "\\",
            "'",
            '"',
            "${x:-",
            "${y#",
            "$x",
            "\u3000",
        ]
    ),
    max_size=10,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(text=_PIECES, escape=st.sampled_from("\\`"), quotes=st.booleans())
def test_words_agree_with_the_port_of_buildkits_lexer(text: str, escape: str, quotes: bool) -> None:
    values = {"x": "one two", "y": "aba", "z": ""}
    ours = partial(Lexer, text, values, escape, Budget(), quotes=quotes)
    port = ShellLex(escape, env=values, skip_unset_env=False, skip_process_quotes=not quotes)
    try:
        # BuildKit drops empty words, the port keeps them.
        expected = port.process_word(text), [word for word in port.process_words(text) if word]
    except ValueError:
        with pytest.raises(ExpansionError):
            ours().word()
        return
    if "#" in text and ("'" in text or '"' in text or "\\" in text):
        return  # the port is older than BuildKit's rules for quotes in patterns
    assert (ours().word(), ours().words()) == expected


# --- how much it may be -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["ENV A=$A$A", "ARG A=$A$A", "ENV A=${A//a/aaaa}", "LABEL l=$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A$A"],
)
def test_a_variable_that_doubles_again_and_again_is_an_error_with_its_line(plan: Plan, line: str) -> None:
    text = "FROM scratch\nENV A=" + "a" * 100_000 + "\n" + f"{line}\n" * 30
    with pytest.raises(InputError, match=r"expand to more than \d+ characters") as caught:
        plan(text)
    assert caught.value.location is not None
    assert 3 <= caught.value.location.line < 10
    assert len(caught.value.message) < 400


def test_all_variables_together_have_a_bound_too(plan: Plan) -> None:
    lines = "".join(f"LABEL l{number}=$A\n" for number in range(1000))
    with pytest.raises(InputError, match="this Dockerfile expand to too much altogether") as caught:
        plan("FROM scratch\nENV A=" + "a" * 500_000 + "\n" + lines)
    assert caught.value.location is not None
    assert caught.value.location.line > 100


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"ENV A{number}=b\nRUN true\n" for number in range(6_000)),
        "".join(f"ARG A{number}=b\nRUN true\n" for number in range(6_000)),
        "WORKDIR below\n" * 10_000,
        f"SHELL {json.dumps(['sh'] * 10_000)}\n" + "RUN true\n" * 1_000,
        "ENV " + " ".join(f"A{number}=b" for number in range(10_000)) + "\n" + "FROM base\n" * 1_000,
    ],
    ids=["ENV", "ARG", "WORKDIR", "SHELL", "FROM"],
)
def test_what_instructions_have_of_those_before_them_has_a_bound(read: Read, text: str) -> None:
    with pytest.raises(InputError, match=r"what the instructions .* is too much altogether") as caught:
        read(f"FROM scratch AS base\n{text}", every_stage=True)
    assert caught.value.location is not None
    assert caught.value.location.line > 100


def test_a_heredoc_may_hold_much_but_not_anything(plan: Plan) -> None:
    body = "$A\n" * 50_000
    made = plan(f"FROM scratch\nARG A=0123456789\nCOPY <<E /f\n{body}E\n")
    assert made.steps
    with pytest.raises(InputError, match="in a heredoc: the variables in it expand to more") as caught:
        plan(f"FROM scratch\nARG A={'a' * 10_000}\nCOPY <<E /f\n{body}E\n")
    assert caught.value.location == Location("Dockerfile", 3)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("FROM scratch\nENV A=${a\n", r"write \ before a $ or a quotation mark that is meant as it is"),
        (
            "# escape=`\nFROM scratch\nENV A=${a\n",
            "write ` before a $ or a quotation mark that is meant as it is",
        ),
        (
            "# escape=`\nFROM scratch\nCOPY <<EOF /x\n${a\nEOF\n",
            r"write \ before a $ or a quotation mark that is meant as it is",
        ),
        ('FROM scratch\nENV A="${a:?give a quote}"\n', None),
    ],
)
def test_a_malformed_word_is_told_its_escape_and_no_other(plan: Plan, text: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        plan(text)
    assert caught.value.hint == hint


@pytest.mark.parametrize(("word", "quote"), [('/"x', "double"), ("/'x", "single")])
def test_a_quote_without_an_end_is_an_error(read: Read, word: str, quote: str) -> None:
    with pytest.raises(InputError) as caught:
        read(f"FROM scratch\nENV a=b\nWORKDIR {word}\n")
    assert f"unexpected end of statement while looking for matching {quote}-quote" in caught.value.message
    assert caught.value.location == Location("Dockerfile", 3)
