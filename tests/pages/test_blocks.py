"""Every command in the documentation is run by a test, or the page says why not; all of them are there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.settings import BuildSettings
from firebuild_pki import SettingsError
from firebuild_pki.config import Document, validate
from machine_qemu.kernels import find_test_kernel
from pages.blocks import Shell, blocks, compare, needs, parse, transcript
from support import REPO

_FILES = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("plugins/*/README.md")]
# Pages without commands of users, and those that are written from the parser.
PAGES = sorted(
    str(page.relative_to(REPO))
    for page in _FILES
    if page.name not in {"ARCHITECTURE.md", "CHANGELOG.md"} and page.parent.name != "reference"
)
BLOCKS = [block for page in PAGES for block in blocks(page)]


def _run_pages() -> list[Any]:
    pages = sorted({block.page for block in BLOCKS if block.kind == "run"})
    # Virtual machines boot one after the other.
    groups = {page: [pytest.mark.xdist_group("qemu")] if "qemu" in needs(page) else [] for page in pages}
    return [
        pytest.param(page, marks=[pytest.mark.needs("userns", *needs(page)), *groups[page]], id=page)
        for page in pages
    ]


@pytest.mark.parametrize("page", _run_pages())
def test_the_commands_of_a_page_print_what_it_shows(page: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path, os.environ)
    if "qemu" in needs(page):
        shell(f"export FIREBUILD_MACHINE__QEMU__KERNEL={find_test_kernel()}")
    wrong = []
    for block in blocks(page):
        if block.kind == "file":
            (shell.work / block.detail).parent.mkdir(parents=True, exist_ok=True)
            (shell.work / block.detail).write_text(block.text)
        elif block.kind == "before":
            status, printed = shell(block.text)
            assert status == 0, f"{block}: {printed}"
        elif block.kind == "run":
            together = [(f"set -e\n{block.text}", "…")]
            runs = transcript(block.text) if block.language == "console" else together
            for command, expected in runs:
                wrong.append(compare(str(block), command, expected, *shell(command)))
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_every_block_of_commands_is_run_or_says_why_not() -> None:
    unsaid = [str(block) for block in BLOCKS if block.is_code and not block.kind]
    assert not unsaid, "\n".join(unsaid)
    pointless = [str(block) for block in BLOCKS if block.kind == "not run" and len(block.detail.split()) < 2]
    assert pointless == []


def test_the_test_that_a_block_names_reads_the_page() -> None:
    wrong = []
    for block in BLOCKS:
        if block.kind == "tested":
            names = [REPO / name for name in re.findall(r"(?:tests|plugins)/[\w./-]+", block.detail)]
            files = [file for name in names for file in (name.rglob("*.py") if name.is_dir() else [name])]
            if not any(Path(block.page).stem in file.read_text() for file in files):
                wrong.append(f"{block}: {block.detail}")
    assert not wrong, "\n".join(wrong)


def test_every_command_of_firebuild_that_is_not_run_is_one_of_the_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = [
        (block, words)
        for block in BLOCKS
        if block.kind not in {"run", "before"}
        for words in block.firebuild()
    ]
    assert len(shown) > 40
    wrong = []
    for block, words in shown:
        try:
            parse(words)
        except click.ClickException as error:
            if "does not exist" not in error.message:  # a file that the reader has
                wrong.append(f"{block}: firebuild {' '.join(words)}: {error.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_every_command_that_a_sentence_names_is_one_of_the_parser() -> None:
    # Not what a reader fills in, nor alternatives.
    spans = [
        (page, span.replace("\\|", "|"))
        for page in PAGES
        for span in re.findall(r"`firebuild ([^`…\n]+)`", (REPO / page).read_text())
        if not re.match(r"[A-Z-]|[^-\s]*[|<]|\w+ \w+\|", span)
    ]
    assert len(spans) > 200
    wrong = []
    for page, span in spans:
        words, context = shlex.split(re.split(r" [|<>&;]", span)[0]), click.Context(app)
        command: click.Command = app
        while words and isinstance(command, click.Group):
            try:
                _, found, words = command.resolve_command(context, words)
            except click.ClickException as error:
                wrong.append(f"{page}: firebuild {span}: {error.format_message()}")
                break
            assert found is not None
            command, context = found, click.Context(found, parent=context)
        options = {name for each in command.params for name in each.opts} | {"--help"}
        given = {name for word in words if (name := word.partition("=")[0]).startswith("--")}
        unknown = sorted(given - options)
        if unknown and not isinstance(command, click.Group):
            wrong.append(f"{page}: firebuild {span}: {unknown}")
    assert not wrong, "\n".join(wrong)


# A page may show a part of a file, or name a plugin that it tells how to write.
_PARTIAL = ("this setting is required", "nor an installed plugin", "no installed observer")


def test_every_configuration_that_a_page_shows_is_one_of_the_models() -> None:
    wrong, accepted = [], 0
    for block in BLOCKS:
        if block.kind == "file" or block.language not in {"yaml", ""} or "…" in block.text:
            continue
        try:
            loaded = yaml.safe_load(block.text)
        except yaml.YAMLError:
            continue
        if isinstance(loaded, dict) and set(loaded) <= set(BuildSettings.model_fields):
            accepted += 1
            try:
                validate(BuildSettings, Document(loaded))
            except SettingsError as error:
                lines = [line for line in str(error).splitlines() if not any(one in line for one in _PARTIAL)]
                wrong += [f"{block}: {line}" for line in lines]
    assert not wrong, "\n".join(wrong)
    assert accepted > 15


def test_commands_are_told_from_what_they_print() -> None:
    assert list(transcript("$ one \\\n  two\nout\n$ three\n")) == [("one \\\n  two", "out\n"), ("three", "")]


@pytest.mark.parametrize(
    ("expected", "status", "printed", "right"),
    [
        ("Built b0123456789ab in 1.2s\n", 0, "Built bfedcba987654 in 33.0s\n", True),
        ("size 1.5 MiB\n", 0, "size 20 KiB\n", True),
        ("a\n…\nz\n", 0, "a\nb\nc\nz\n", True),
        ("a\n…\nz\n", 0, "a\nz\n", True),
        ("a … z\n", 0, "a b\nc z\n", False),
        ("a\n", 0, "storing the image …\na\n", True),
        ("a\n", 0, "b\n", False),
        ("a\n", 1, "a\n", False),
        ("error: a\n", 2, "error: a\n", True),
        ("error: a\n", 0, "error: a\n", False),
    ],
)
def test_what_is_printed_has_to_be_what_is_shown(
    expected: str, status: int, printed: str, right: bool
) -> None:
    assert (compare("page:1", "command", expected, status, printed) == "") is right
