"""Whatever is given to whichever option: a sentence and a documented status, never an internal error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.errors import ExitStatus

BYTES = ("\udcff", "x\udcffy", "a=\udcff")
ELSEWHERE = ("/", "../..")
BAD = (
    *BYTES,
    "",
    "a\nb",
    "\x1b[2J",
    "x" * 70_000,
    "9" * 5_000,
    "-1",
    "=",
    ",",
    "localhost:99999/x",
    *ELSEWHERE,
)
REFUSED = ("", "x\udcffy")
YAML = ("[" * 5_000, "{a: " * 5_000, "!!x y", "&a *a", "? [a]", "!!binary x", "1e999")
NAMES = ("CA", "CA__PROVIDER", "MACHINE__DRIVER", "STORE__PATH", "CA__\udcff", "BOOTSTRAP__BIND")

Named = tuple[tuple[str, ...], click.Command]


def commands(group: click.Command, path: tuple[str, ...] = ()) -> Iterator[Named]:
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))
    else:
        yield path, group


def places() -> Iterator[Any]:
    """Each option and argument of each command, what else that needs to be complete, and values for it."""
    for path, command in commands(app):
        refusing = set()
        for parameter in command.params:
            if isinstance(parameter, click.Option) and parameter.is_flag and not parameter._flag_needs_value:
                continue
            others = [one for one in command.params if one.required and one is not parameter]
            words = [*path]
            if path == ("initramfs", "build") and "compression" not in parameter.name:
                words += ["--compress", "none"]  # where the value is good, one is made
            for one in others:
                words += [max(one.opts, key=len), "x"] if isinstance(one, click.Option) else ["x"]
            option = max(parameter.opts, key=len) if isinstance(parameter, click.Option) else None
            values: Sequence[str] = BAD
            if isinstance(parameter, click.Option) and parameter.hidden and not parameter.expose_value:
                # of Docker, and refused by its name: all of them by one function, which looks at no value
                values = REFUSED if parameter.callback in refusing else BAD
                refusing.add(parameter.callback)
            name = " ".join([*path, option or parameter.human_readable_name])
            yield pytest.param(words, option, values, id=name)


@pytest.mark.parametrize(("words", "option", "values"), list(places()))
def test_a_bad_value_is_no_internal_error(
    cli: Any, words: list[str], option: str | None, values: Sequence[str]
) -> None:
    for value in values:
        if words[:2] == ["base", "import"] and option is None and value in ELSEWHERE:
            continue  # a good value: all of this machine
        given = value if option is None else f"{option}={value}"
        status = cli.status_of(*words, given)
        assert status != ExitStatus.INTERNAL, ascii(value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", ""],
        ["build", "--file", "Dockerfile", "--config", "", "."],
        ["build", "--iidfile", "", "."],
        ["images", "save", "x:1", "--output", ""],
        ["base", "import", "x", ".", "--image-config", ""],
        ["rm-tree", "x", ""],
    ],
    ids=" ".join,
)
def test_a_path_of_a_variable_that_is_not_set_is_not_the_current_directory(
    cli: Any, arguments: list[str]
) -> None:
    Path("Dockerfile").write_text("FROM scratch\n")
    assert "expected a path, found an empty text" in cli(*arguments, status=2).first


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "-q", "."],
        ["build", "-q", "-o", "tar,dest=x", "/"],
        ["images", "save", "x:1", "-o", "x"],
        ["images", "export", "x:1", "-o", "tar,dest=x"],
    ],
    ids=" ".join,
)
def test_a_current_directory_that_is_gone_is_told(cli: Any, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "gone").mkdir()
    cli.monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current directory is not there any more" in cli(*arguments, status=2).first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [*BAD, *YAML])
def test_a_bad_variable_is_no_internal_error(cli: Any, name: str, value: str) -> None:
    cli.setenv(f"FIREBUILD_{name}", value)
    assert cli.status_of("config", "check") in (ExitStatus.SUCCESS, ExitStatus.BAD_INPUT)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[" * 5_000, "1:51"),
        ("{a: " * 5_000, "1:198"),
        ("".join(" " * n + "a:\n" for n in range(2_000)), "50:50"),
        ("- " * 5_000, "1:101"),
    ],
)
def test_a_deeply_nested_configuration_is_refused_with_its_place(cli: Any, text: str, place: str) -> None:
    Path("c.yaml").write_text(text)
    refused = cli("config", "check", "--config", "c.yaml", status=2)
    assert refused.first == f"error: c.yaml:{place}: not valid YAML: more than 50 values inside each other"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--build-arg", "X=\udcff"),
            "the value of the build argument X contains",
        ),
        (("--build-arg", "\udcff=1"), "the name of the build argument contains"),
        (("--label", "a=\udcff"), "the value of the label a contains"),
        (("--target", "\udcff"), "the name of a stage contains"),
    ],
)
def test_bytes_that_are_no_utf_8_are_refused_by_name(
    cli: Any, arguments: tuple[str, ...], words: str
) -> None:
    assert words in cli("rootfs", "--tag", "a/b:1", *arguments, status=2).first


@pytest.mark.parametrize("text", ["yesterday", "-1", "1e9", "9" * 12, "٣"])
def test_a_source_date_that_is_none_is_refused(cli: Any, text: str) -> None:
    refused = cli("rootfs", "--tag", "a/b:1", "--build-arg", f"SOURCE_DATE_EPOCH={text}", status=2)
    assert refused.first.startswith("error: SOURCE_DATE_EPOCH: expected seconds since 1970, found")
    cli.setenv("SOURCE_DATE_EPOCH", text)
    assert "SOURCE_DATE_EPOCH" in cli("rootfs", "--tag", "a/b:1", status=2).first


def test_a_value_from_the_environment_is_looked_at_too(cli: Any) -> None:
    cli.setenv("SECRET", "top\udcff")
    refused = cli("rootfs", "--tag", "a/b:1", "--build-arg", "SECRET", status=2)
    assert "the value of the build argument SECRET contains" in refused.err
    assert "top" not in refused.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "expected JSON: it is nested too deeply"),
        (
            json.dumps({"config": {"Env": ["A=\ud800"]}}),
            "Env of the image configuration: expected a list of strings, found",
        ),
        (
            json.dumps({"config": {"Env": ["A=\0"]}}),
            "Env of the image configuration: expected a list of strings, found",
        ),
        (
            json.dumps({"config": {"Labels": {"a": "\0"}}}),
            "of the image configuration: expected a string, found",
        ),
        (json.dumps({"config": {"Volumes": {"/\ud800": {}}}}), "an object"),
        (json.dumps({"config": {"User": "\0"}}), "of the image configuration: expected a string, found"),
    ],
)
def test_an_image_configuration_that_nothing_can_hold_is_refused(cli: Any, text: str, words: str) -> None:
    Path("config.json").write_text(text)
    Path("tree").mkdir()
    assert words in cli("base", "import", "x", "tree", "--image-config", "config.json", status=2).first


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        pytest.param(
            "RUN " + "x" * 5_000_000, "Dockerfile:2: a RUN with its variables may take 4194304", id="run"
        ),
        ("HEALTHCHECK --interval=" + "9" * 50 + "s CMD x", "at most 292 years"),
        ("HEALTHCHECK --interval=" + "9" * 5_000 + "s CMD x", "expected a duration such as"),
    ],
)
def test_a_dockerfile_that_no_guest_could_be_told_is_refused_at_once(
    cli: Any, instruction: str, words: str
) -> None:
    Path("Dockerfile").write_text(f"FROM scratch\n{instruction}\n")
    assert words in cli("rootfs", "--tag", "a/b:1", "--output", "tar", status=2).err
