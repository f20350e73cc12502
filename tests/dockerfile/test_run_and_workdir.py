"""Steps, and what the guest is told to run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dockerfile.planning import Plan
from firebuild_bootstrap import messages
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.lowering import WireStep
from firebuild_bootstrap.wire import (
    DEFAULT_PATH,
    CopyCommand,
    RunCommand,
    WorkdirCommand,
)


def run_of(step: WireStep) -> RunCommand:
    assert isinstance(step.command, RunCommand)
    return step.command


def test_steps_count_from_two_and_only_what_the_guest_executes_counts(plan: Plan) -> None:
    made = plan(
        "# a\nFROM scratch\nENV A=1\nRUN one\nLABEL b=2\nWORKDIR /w\nCOPY f .\nRUN two\n", files={"f": ""}
    )
    assert [(step.number, step.line, step.instruction) for step in made.steps] == [
        (2, 4, "RUN one"),
        (3, 6, "WORKDIR /w"),
        (4, 7, "COPY f ."),
        (5, 8, "RUN two"),
    ]
    assert [step.command.step for step in made.steps] == [2, 3, 4, 5]
    assert (made.total, made.base, made.base_line) == (5, "scratch", 2)


def test_every_command_survives_the_wire(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nRUN a\nRUN <<E\n#!/bin/sh\nE\nUSER u:g\nWORKDIR w\n"
        "COPY --chown=1 --chmod=u+x f d/\nADD f g\n",
        files={"f": ""},
    )
    for step in made.steps:
        command = step.command
        if isinstance(command, CopyCommand):
            command = replace(command, source="")  # its files come right after it
        assert messages.decode(messages.encode(command)) == command


def test_run_has_the_environment_user_directory_and_shell_of_its_place(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nRUN one\nENV A=1\nUSER app\nWORKDIR /w\n"
        'SHELL ["/bin/bash", "-ec"]\nRUN two "x  y"\nENV B=2\n'
    )
    first, second = run_of(made.steps[0]), run_of(made.steps[2])
    assert (first.argv, first.env) == (("/bin/sh", "-c", "one"), {"PATH": DEFAULT_PATH})
    assert (first.user, first.workdir) == ("0:0", "/")
    assert second.argv == ("/bin/bash", "-ec", 'two "x  y"')
    assert second.env == {"PATH": DEFAULT_PATH, "A": "1"}
    assert (second.user, second.workdir) == ("app", "/w")


def test_the_default_path_yields_to_one_of_the_image(plan: Plan) -> None:
    assert (
        run_of(plan("FROM scratch\nENV PATH=/opt:$PATH\nRUN x\n").steps[0]).env["PATH"]
        == f"/opt:{DEFAULT_PATH}"
    )


def test_the_json_form_is_executed_as_it_stands(plan: Plan) -> None:
    made = plan('FROM scratch\nRUN ["/bin/echo", "$HOME", "a b"]\n')
    assert run_of(made.steps[0]).argv == ("/bin/echo", "$HOME", "a b")


@pytest.mark.parametrize("text", ["RUN", "RUN []"])
def test_a_run_of_nothing_is_an_error(plan: Plan, text: str) -> None:
    with pytest.raises(InputError, match="RUN: expected a command"):
        plan(f"FROM scratch\n{text}\n")


def test_a_heredoc_is_text_for_the_shell(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<EOF\necho $A\n\techo b\nEOF\n").steps[0])
    assert command.argv == ("/bin/sh", "-c", "echo $A\n\techo b\n")
    assert command.script is None


def test_a_heredoc_with_an_interpreter_is_a_script(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<EOF\n#!/usr/bin/python3\nprint($A)\nEOF\n").steps[0])
    assert command.script == "#!/usr/bin/python3\nprint($A)\n"
    assert command.argv[-1] == command.script


def test_a_dash_strips_leading_tabs_from_a_heredoc(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN <<-EOF\n\t\techo a\n\t  echo b\n\tEOF\n").steps[0])
    assert command.argv[-1] == "echo a\n  echo b\n"


def test_heredocs_of_a_command_are_left_to_the_shell(plan: Plan) -> None:
    text = "cat <<A - <<'B'\none $x\nA\ntwo $x\nB\n"
    command = run_of(plan(f"FROM scratch\nRUN {text}RUN next\n").steps[0])
    assert command.argv == ("/bin/sh", "-c", text)
    assert command.script is None


def test_a_heredoc_for_a_program_is_no_script_even_with_an_interpreter_line(plan: Plan) -> None:
    command = run_of(plan("FROM scratch\nRUN cat <<A\n#!/bin/sh\nA\n").steps[0])
    assert (command.script, command.argv[-1]) == (None, "cat <<A\n#!/bin/sh\nA\n")


def test_crlf_does_not_reach_the_shell_through_a_heredoc(plan: Plan) -> None:
    made = plan(
        "FROM scratch\r\nRUN <<EOF\r\nif true; then\r\n echo\r\nfi\r\nEOF\r\nRUN cat <<E\r\nx\r\nE\r\n"
    )
    assert run_of(made.steps[0]).argv[-1] == "if true; then\n echo\nfi\n"
    assert run_of(made.steps[1]).argv[-1] == "cat <<E\nx\nE\n"


def test_workdirs_chain_and_belong_to_the_user_of_their_place(plan: Plan) -> None:
    made = plan(
        "FROM scratch\nWORKDIR a\nUSER u\nWORKDIR b/../c/\nWORKDIR /x//y\nWORKDIR //z\nWORKDIR ../../..\n"
    )
    assert [step.command for step in made.steps[:2]] == [
        WorkdirCommand(step=2, original="WORKDIR a", workdir="/a", user="0:0"),
        WorkdirCommand(step=3, original="WORKDIR b/../c/", workdir="/a/c", user="u"),
    ]
    assert [step.command.workdir for step in made.steps[2:]] == ["/x/y", "/z", "/"]
    assert made.config.workdir == "/"


@pytest.mark.parametrize("text", ["$unset", '""'])
def test_a_workdir_that_expands_to_nothing_changes_nothing_and_says_so(plan: Plan, text: str) -> None:
    made = plan(f"FROM scratch\nWORKDIR /a\nWORKDIR {text}\nRUN true\n")
    assert (made.config.workdir, made.steps[-1].command.workdir) == ("/a", "/a")
    assert [(each.location.line, each.message) for each in made.warnings] == [
        (3, f"WORKDIR {text} expands to nothing and changes nothing")
    ]


def test_a_workdir_of_nothing_is_an_error(plan: Plan) -> None:
    with pytest.raises(InputError, match="WORKDIR: expected a value"):
        plan("FROM scratch\nWORKDIR\n")
