"""What bash, zsh and fish offer at Tab: the real shells, and the answers that their scripts get."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

import click
import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli import completion
from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.cli.completion import split_line
from firebuild_bootstrap.cli.options import MACHINES
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.polling import readable

# What is typed before Tab, and the words that the shell then has.
LINES = {
    "imag": ["images"],
    "images rm t/on": ["images", "rm", "t/one:1.0"],
    "images rm t/one:": ["images", "rm", "t/one:1.0"],
    "images rm localhost:5000/app:2": ["images", "rm", "localhost:5000/app:2.1"],
    "images rm 't/one:1": ["images", "rm", "t/one:1.0"],
    "base rm ti": ["base", "rm", "tiny:latest"],
    "build --machine=q": ["build", "--machine=qemu"],
    "build --machine q": ["build", "--machine", "qemu"],
    "doctor --ca e": ["doctor", "--ca", "embedded"],
    "build --cache-from type=r": ["build", "--cache-from", "type=registry,ref="],
    "build -f in/a": ["build", "-f", "in/a file"],
    "images rm --config=in/a": ["images", "rm", "--config=in/a file"],
    "build --output ext4,dest=in/a": ["build", "--output", "ext4,dest=in/a file"],
    "build --context in/d": ["build", "--context", "in/deep/"],
}


PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with files to name, and `home`: a store with images and a base."""
    root = tmp_path_factory.mktemp("stored")
    (root / "in/deep").mkdir(parents=True)
    (root / "in/a file").write_text("FROM scratch\nCOPY a* /\n")
    for command in (
        ("build", "-q", "-f", "in/a file", "-t", "t/one:1.0", "-t", "localhost:5000/app:2.1", "in"),
        ("base", "import", "tiny", "in"),
    ):
        environ = {"PATH": os.environ["PATH"], "FIREBUILD_HOME": str(root / "home")}
        subprocess.run([PROGRAMS / "firebuild", *command], cwd=root, env=environ, check=True)
    return root


@pytest.fixture
def store(cli: Cli, stored: Path) -> Path:
    """The store; `firebuild` is in PATH, and the files to name are here."""
    cli.setenv("FIREBUILD_HOME", stored / "home")
    cli.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")
    cli.monkeypatch.chdir(stored)
    return stored / "home"


def as_typed(words: str) -> list[str]:
    """What the shell has after Tab, where a directory may end with a slash or without."""
    return [word.rstrip("/") for word in shlex.split(words)]


@contextmanager
def typing(*command: str) -> Iterator[int]:
    """Give a shell on a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        with suppress(OSError):
            os.execvpe(command[0], command, {**os.environ, "TERM": "dumb"})
        os._exit(127)
    try:
        yield terminal
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def read_until(terminal: int, mark: bytes) -> bytes:
    seen = b""
    while mark not in seen:
        assert readable(terminal, seconds=60), seen
        seen += os.read(terminal, 1 << 16)
    return seen


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    ("command", "setup"),
    [
        pytest.param(
            ("bash", "--norc", "--noprofile", "-i"),
            "bind 'set enable-bracketed-paste off'; eval \"$(firebuild completion bash)\"",
            id="bash",
        ),
        pytest.param(
            ("zsh", "-f", "-i"),
            'bindkey -e; autoload -Uz compinit; compinit -D -u; eval "$(firebuild completion zsh)"',
            id="zsh",
            marks=pytest.mark.needs("zsh"),
        ),
    ],
)
def test_a_shell_completes_words_with_odd_characters(
    store: Path, command: tuple[str, ...], setup: str
) -> None:
    with typing(*command) as terminal:
        os.write(terminal, f"{setup}; echo REA''DY\n".encode())
        read_until(terminal, b"READY")
        for typed, expected in LINES.items():
            # Tab; then to the beginning of the line, to have the words printed instead of executed.
            os.write(
                terminal,
                b"firebuild %b\t\x01printf '%%s\\n' BEG''IN; printf '%%q ' \x05; echo EN''D\n"
                % typed.encode(),
            )
            words = read_until(terminal, b"END").partition(b"BEGIN")[2].partition(b"END")[0]
            assert as_typed(words.decode()) == ["firebuild", *(word.rstrip("/") for word in expected)], typed


@pytest.mark.needs("fish", "userns")
def test_fish_completes_the_same_words_and_says_what_they_are(store: Path) -> None:
    script = "firebuild completion fish | source\n" + "".join(
        f"complete -C {shlex.quote(f'firebuild {typed}')} | string join \\v; echo -e '\\f'\n"
        for typed in (*LINES, "NAME=1")
    )
    done = subprocess.run(["fish", "-N", "-c", script], capture_output=True, text=True, check=True)
    answers = [answer.strip("\n") for answer in done.stdout.split("\f")]
    for (typed, expected), answer in zip(LINES.items(), answers, strict=False):
        assert answer.partition("\t")[0].rstrip("/") == expected[-1].rstrip("/"), typed
    assert answers[0] == "images\tList, inspect, tag and remove images."


def answers(cli: Cli, line: str, shell: str = "bash") -> list[str]:
    cli.setenv("_FIREBUILD_COMPLETE", f"{shell}_complete")
    cli.setenv("COMP_WORDBREAKS", " \t\n\"'@><=;|&(:")
    cli.setenv("COMP_LINE", line)
    return [answer for answer in cli().out.splitlines() if answer]


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("firebuild images inspect ", {"plain\tt/one:1.0", "plain\tlocalhost:5000/app:2.1"}),
        ("firebuild images rm t/one:1.0 localhost:5000/", {"plain\t5000/app:2.1"}),
        ('firebuild images rm "localhost:5000/app:', {"plain\tlocalhost:5000/app:2.1"}),
        ("LC_ALL=C A+=b sudo -u me /usr/bin/firebuild base rm ", {"plain\ttiny:latest"}),
        ("fb base rm ", {"plain\ttiny:latest"}),
        ("firebuild build --machine ", {f"plain\t{name}" for name in MACHINES}),
        ("firebuild ca check --ca v", {"plain\tvault"}),
        ("firebuild build --progress r", {"plain\trawjson"}),
        ("firebuild build --secr", {"plain\t--secret"}),
        ("firebuild build --pull=m", {"plain\tmissing"}),
        ("firebuild build -o t", {"plain\ttar"}),
        ("firebuild build --cache-to type=l", {"open\tlocal,dest="}),
        ("firebuild cache prune --filter ", {"open\tuntil="}),
        ("firebuild run --machine ", {"plain\tqemu", "plain\tfirecracker", "plain\tlocal"}),
        ("firebuild build --context ", {"dir\t"}),
        ("firebuild build --label ", set()),
        ("firebuild build --label A\\", set()),
        ("", {"plain\tbuild"}),
    ],
)
def test_a_line_is_answered_with_what_goes_behind_it(
    cli: Cli, store: Path, line: str, expected: set[str]
) -> None:
    found = set(answers(cli, line))
    assert found == expected if line else expected < found


@pytest.mark.needs("userns")
def test_the_store_is_that_of_the_configuration_on_the_line(cli: Cli, store: Path, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(f"store: {{path: {tmp_path / 'other'}}}\n")
    assert answers(cli, f"firebuild images rm --config {config} ") == []
    cli.setenv("FIREBUILD_HOME", tmp_path / "other")
    assert answers(cli, "firebuild images rm ") == []
    cli.setenv("FIREBUILD_STORE__PATH", store)
    assert "plain\tt/one:1.0" in answers(cli, "firebuild images rm ")


@pytest.mark.parametrize("config", ["missing.yaml", "broken.yaml"])
def test_a_broken_store_or_configuration_completes_nothing_and_says_nothing(cli: Cli, config: str) -> None:
    Path("broken.yaml").write_text("store: [")
    cli.setenv("FIREBUILD_HOME", "/dev/null")
    assert answers(cli, "firebuild images rm ") == []
    assert answers(cli, f"firebuild base rm --config {config} ") == []


@pytest.mark.needs("userns")
def test_a_completion_removes_nothing_and_makes_nothing(cli: Cli) -> None:
    dead = cli.home / "builds" / "dead"
    dead.mkdir(parents=True)
    answers(cli, "firebuild images rm ")
    assert list(cli.home.rglob("*")) == [cli.home / "builds", dead]


def test_help_stands_behind_the_words_of_zsh_and_fish(cli: Cli) -> None:
    for shell in ("zsh", "fish"):
        assert answers(cli, "firebuild imag", shell) == [
            "plain\timages\tList, inspect, tag and remove images."
        ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_the_same_by_command_and_by_variable(cli: Cli, shell: str) -> None:
    script = cli("completion", shell).out
    assert f"{shell}_complete" in script.replace("=", "").replace(" ", "").replace("COMPLETE", "")
    cli.setenv("_FIREBUILD_COMPLETE", f"{shell}_source")
    assert cli().out == script


@pytest.mark.parametrize(
    ("line", "words", "last"),
    [
        ("a b", ["a"], "b"),
        ("a b ", ["a", "b"], ""),
        ("a 'b c' \"d e", ["a", "b c"], "d e"),
        ("a b\\ c", ["a"], "b c"),
        ("a b\\", ["a"], "b"),
        ("a '", ["a"], ""),
        ("a #b", ["a"], "#b"),
        ("", [], ""),
    ],
)
def test_a_line_is_split_as_a_shell_does(line: str, words: list[str], last: str) -> None:
    assert split_line(line) == (words, last)


def test_the_machines_that_are_completed_are_all_there_are() -> None:
    assert get_args(MachineSettings.model_fields["driver"].annotation) == MACHINES


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for sub in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options(sub)


def test_every_option_whose_values_are_known_is_there() -> None:
    known = {
        *completion.BEGINNINGS,
        *completion.FILES,
        *completion.DIRECTORIES,
        *completion.BEHIND_EQUALS,
    }
    assert known <= set(options(app))
