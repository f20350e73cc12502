"""What `--help` says: an example of each command, and the choices of each option that has some."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.cli.completion import BEGINNINGS, REFUSED
from firebuild_bootstrap.cli.examples import EXAMPLES, commands_of
from firebuild_bootstrap.cli.options import MACHINES
from firebuild_bootstrap.errors import ExitStatus

COMMANDS = {" ".join(words): command for words, command in commands_of(app)}
LEAVES = {words: command for words, command in COMMANDS.items() if not isinstance(command, click.Group)}


def parsed(line: str) -> tuple[str, click.Context]:
    """Read a command line as the program does, up to where it would begin to work."""
    words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line).partition(" > ")[0])
    assert words[0] == "firebuild"
    context = app.make_context("firebuild", words[1:])
    path = []
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert name is not None
        assert command is not None
        path.append(name)
        context = command.make_context(name, rest, parent=context)
    return " ".join(path), context


def test_every_command_has_an_example_and_every_example_a_command() -> None:
    assert set(EXAMPLES) == set(LEAVES)


@pytest.mark.parametrize("group", sorted(set(COMMANDS) - set(LEAVES)))
def test_no_command_in_a_list_is_described_by_half_a_sentence(cli: Cli, group: str) -> None:
    commands = cli(*group.split(), "--help").out.partition("\nCommands:\n")[2].splitlines()
    assert commands
    assert [line for line in commands if line.endswith("...")] == []


def test_every_exit_status_is_in_the_help_and_in_the_readme(cli: Cli) -> None:
    told = cli("--help").out.partition("Exit status:")[2]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    for status in ExitStatus:
        assert re.search(rf"\b{status.value}\s+[a-z]", told), status
        assert f"\n| {status.value} | " in readme, status


@pytest.mark.parametrize("words", EXAMPLES)
def test_the_help_ends_with_examples_that_the_program_takes(cli: Cli, words: str) -> None:
    for name in ("rootfs.tar.gz", "apps.tar"):  # what has to be there
        Path(name).touch()
    examples = EXAMPLES[words]
    shown = cli(*words.split(), "--help").out.splitlines()
    assert tuple(line.strip() for line in shown[-len(examples) :]) == examples
    assert shown[-len(examples) - 1].strip().startswith("Example")
    for example in examples:
        assert len(example) <= 80
        assert parsed(example)[0] == words


def shown(option: click.Parameter, context: click.Context) -> str:
    assert isinstance(option, click.Option)
    return f"{option.make_metavar(context)} {option.help}"


@pytest.mark.parametrize("words", LEAVES)
def test_every_option_with_choices_names_them(words: str) -> None:
    context = click.Context(LEAVES[words])
    for option in LEAVES[words].params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        assert option.help, option.opts
        known = MACHINES if "--machine" in option.opts else BEGINNINGS.get(option.opts[0], ())
        if isinstance(option.type, click.Choice):
            known = tuple(map(str, option.type.choices))
        elif isinstance(option.type, click.Path):
            known = ()
        known = tuple(word for word in known if word not in REFUSED.get(words, ()))
        text = shown(option, context)
        assert all(part in text for word in known for part in re.split("[,=]", word)), (option.opts, text)
