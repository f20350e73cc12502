"""Every row of docs/from-docker.md is what the command line does."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from firebuild_bootstrap.cli import docker
from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.cli.docker import DockerCommand
from firebuild_bootstrap.errors import InputError

PAGE = Path(__file__).parents[2] / "docs/from-docker.md"
BUILD = app.commands["build"]


@dataclass(frozen=True)
class Row:
    """One option of another tool, with what the page says about it."""

    name: str
    short: str
    here: str
    words: str


def tables() -> dict[str, list[Row]]:
    """The rows of each table of options, by its heading."""
    found: dict[str, list[Row]] = defaultdict(list)
    heading = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        if match := re.fullmatch(r"\| `(--[\w-]+)`(?:, `(-\w)`)? \| (.+?) \| (.*?) ?\|", line):
            found[heading].append(Row(match[1], match[2] or "", match[3], match[4]))
    return dict(found)


TABLES = tables()
RUNNING = TABLES.pop("Running")
ROWS = sorted({row.name: row for rows in TABLES.values() for row in rows}.values(), key=lambda row: row.name)


def parse(*words: str) -> str:
    """Read options as `firebuild build` does, and return the words of a refusal, or nothing."""
    try:
        BUILD.make_context("build", [*words, "."])
    except InputError as error:
        named = error.message.startswith(f"{words[0].partition('=')[0]} is an option of ")
        return (error.hint or "") if named else error.message
    return ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-f=a/Dockerfile -t=x:1", {"dockerfile": "a/Dockerfile", "tags": ("x:1",)}),
        ("-fa/Dockerfile -tx:1", {"dockerfile": "a/Dockerfile", "tags": ("x:1",)}),
        ("-f a/Dockerfile -t x:1", {"dockerfile": "a/Dockerfile", "tags": ("x:1",)}),
        ("-t=a=b", {"tags": ("a=b",)}),
        ("-q=true", {"quiet": True}),
        ("-q=0", {"quiet": False}),
        ("-qtx:1", {"quiet": True, "tags": ("x:1",)}),
        ("-qt=x:1", {"quiet": True, "tags": ("x:1",)}),
        ("-qt x:1", {"quiet": True, "tags": ("x:1",)}),
        ("-qq=false -t=x", {"quiet": True, "tags": ("x",)}),
        ("--build-arg -q=true", {"quiet": False, "build_args": ("-q=true",)}),
        ("--tag --push=false", {"push": False, "tags": ("--push=false",)}),
        ("--tag=--push=false", {"push": False, "tags": ("--push=false",)}),
    ],
)
def test_options_are_written_as_docker_has_them(words: str, expected: dict[str, object]) -> None:
    context = BUILD.make_context("build", [*words.split(), "."])
    assert context.params | expected == context.params
    assert context.params["path"] == "."


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-d=false image -d=x", {"detach": False, "command": ("-d=x",)}),
        ("-itd=false image", {"interactive": True, "tty": True, "detach": False, "command": ()}),
        ("-ie=A=1 image -e", {"interactive": True, "env": ("A=1",), "command": ("-e",)}),
        ("-e A=1 -- image -- -i=x", {"env": ("A=1",), "command": ("--", "-i=x")}),
    ],
)
def test_options_of_run_end_at_the_image(words: str, expected: dict[str, object]) -> None:
    context = app.commands["run"].make_context("run", words.split())
    assert context.params | expected == context.params
    assert context.params["image"] == "image"


def test_a_flag_that_is_neither_true_nor_false_is_named() -> None:
    with pytest.raises(InputError, match="-q: expected true or false, found 'maybe'"):
        BUILD.make_context("build", ["-q=maybe", "."])


def done(name: str) -> bool:
    return any(name in option.opts for option in BUILD.params if option.expose_value)


def refused() -> set[str]:
    others = [table for kinds in (docker._OTHER_FLAGS, docker._OTHER_OPTIONS) for table in kinds.values()]
    return {name for table in (docker._REFUSED_FLAGS, docker._REFUSED_OPTIONS, *others) for name in table}


def takes_a_value(name: str) -> bool:
    option = next(each for each in BUILD.params if name in each.opts)
    assert isinstance(option, click.Option)
    return not option.is_flag and not option._flag_needs_value


def test_every_row_is_what_the_command_line_does() -> None:
    assert len(ROWS) > 150
    for row in ROWS:
        compare(row)


def compare(row: Row) -> None:
    if row.here == "same":
        assert done(row.name), row
        return
    assert not done(row.name), row
    value = "=x" if takes_a_value(row.name) else ""
    if row.here == "accepted":
        assert parse(f"{row.name}{value}") == "", row
    elif row.here == "refused":
        assert parse(f"{row.name}{value}") == row.words
    else:
        words = re.findall("`([^`]+)`", row.here)
        assert row.here == "only " + ", ".join(f"`{word}`" for word in words)
        assert [parse(f"{row.name}={word}") for word in words] == [""] * len(words), row
        others = ["true", "false"] if not value else ["host"]
        assert {parse(f"{row.name}={other}") for other in others if other not in words} == {row.words}


def test_a_short_form_means_what_the_page_says() -> None:
    for row in (row for rows in TABLES.values() for row in rows if row.short):
        [option] = [each for each in BUILD.params if row.short in each.opts]
        assert row.name in option.opts, row


def test_nothing_is_refused_that_the_page_does_not_have_and_no_option_has_two_rows_in_a_table() -> None:
    assert refused() <= {row.name for row in ROWS}
    for rows in TABLES.values():
        names = [row.name for row in rows]
        assert sorted(set(names), key=names.index) == names
    rows = [row for rows in TABLES.values() for row in rows if row.here != "same"]
    assert len({(row.name, row.here, row.words) for row in rows}) == len({row.name for row in rows})


def test_options_that_the_words_name_exist() -> None:
    mentioned = {word for row in ROWS for word in re.findall(r"(?<![\w-])--[a-z-]+(?![\w-]*`)", row.words)}
    words = mentioned - {"--from", "--mount", "--older-than"}
    assert {word for word in words if not done(word)} == set()


def test_every_row_of_docker_run_is_what_the_command_line_does() -> None:
    given: tuple[str, ...]
    run = app.commands["run"]
    assert isinstance(run, DockerCommand)
    for row in RUNNING:
        [option] = [one for one in run.params if row.name in one.opts]
        assert isinstance(option, click.Option)
        assert set(option.opts) >= {row.name, row.short} - {""}, row
        assert option.hidden == (row.here != "same"), row
        if row.here == "same":
            continue
        given = (row.name,) if option.is_flag else (row.name, "x")
        words = [*given, "image"]
        if row.here == "accepted":
            DockerCommand.parse_args(run, click.Context(run), words)
            continue
        with pytest.raises(InputError) as raised:
            DockerCommand.parse_args(run, click.Context(run), words)
        assert raised.value.message == f"{row.name} is an option of docker run that firebuild does not have"
        assert (row.here, row.words) == ("refused", raised.value.hint)
    names = {row.name for row in RUNNING}
    assert len(names) == len(RUNNING)
    assert {one.opts[0] for one in run.params if getattr(one, "hidden", False)} <= names
    mentioned = {word for row in RUNNING for word in re.findall(r"(?<![`\w-])--[a-z-]+", row.words)}
    known = {
        name for command in ("run", "build") for one in app.commands[command].params for name in one.opts
    }
    assert mentioned - {"--follow", "--time"} <= known


@pytest.mark.needs("buildah")
def test_no_option_of_this_machine_s_buildah_is_missing() -> None:
    shown = subprocess.run(["buildah", "build", "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"^ {2}(?:-\w, | {4})(--[\w-]+)", shown, re.MULTILINE)) - {"--help"}
    assert options <= {row.name for row in TABLES["buildah build"]}
    assert len(options) > 80


@pytest.mark.parametrize("flag", ["--tls-verify=maybe", "--insecure=2"])
def test_a_flag_of_another_tool_takes_true_or_false(flag: str) -> None:
    with pytest.raises(InputError, match="expected true or false"):
        BUILD.make_context("build", [flag, "."])
