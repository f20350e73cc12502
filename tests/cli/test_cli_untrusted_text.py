"""Untrusted text in every command: shown escaped and cut, and never an internal error."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli.failure import report
from firebuild_bootstrap.cli.output import as_text
from firebuild_bootstrap.cli.screen import print_table
from firebuild_bootstrap.errors import GuestLost, InputError, StepFailed
from firebuild_pki import CAError, ProviderError

EVIL = "a\x1b]0;title\x07\r\x9b2J\u202e\udcff" + "x" * 100_000


@pytest.mark.parametrize(
    "error",
    [
        ProviderError(EVIL, provider="p", hint=EVIL),
        CAError(EVIL),
        InputError(EVIL),
        GuestLost("lost", hint=EVIL),
        StepFailed(EVIL),
        click.UsageError(EVIL),
        click.BadParameter(EVIL),
        ValueError(EVIL),
        OSError(28, "full", EVIL),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_can_touch_the_terminal(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    report(error)
    shown = capfd.readouterr().err
    assert r"a\x1b]0;title\x07" in shown
    assert all(line.isprintable() for line in shown.split("\n"))
    assert len(shown) < 20_000


def test_nor_can_the_traceback_of_a_mistake_of_ours(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREBUILD_DEBUG", "1")
    report(ValueError(EVIL))
    shown = capfd.readouterr().err
    assert "ValueError" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


def test_tables_align_what_is_wide_and_escape_what_is_not_printable(
    capfd: pytest.CaptureFixture[str],
) -> None:
    print_table(("NAME", "SIZE"), [("日本", "1"), ("a\x1bb", "2"), ("é", "3")])
    assert capfd.readouterr().out == "NAME    SIZE\n日本    1\na\\x1bb  2\né       3\n"


def test_json_is_readable_and_harmless() -> None:
    document = {"name": "größe 日本", "evil": "\x1b\x9b\x7f\u202e\udcff\n\t", "new": "\U000e0001"}
    text = as_text(document)
    assert json.loads(text) == document
    assert "größe 日本" in text
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize("name", ["evil\x1b[2J", "evil\udcff"])
def test_file_names_are_shown_escaped(cli: Cli, name: str, tmp_path: Path) -> None:
    config = tmp_path / f"{name}.yaml"
    config.write_text("{}")
    shown = cli("config", "check", "--config", str(config)).out
    assert "evil\\x" in shown
    assert "\x1b" not in shown


def test_the_words_of_an_unknown_option_are_shown_escaped(cli: Cli) -> None:
    done = cli("images", "inspect", "\x1b[2J", status=2)
    assert "\x1b" not in done.err
    assert "\x1b" not in cli("--\x1b[2J", status=2).err
