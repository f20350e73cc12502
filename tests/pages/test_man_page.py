"""man/firebuild.1 is what the program says, and what man and mandoc read without a complaint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from firebuild_bootstrap.cli.app import app
from firebuild_bootstrap.cli.examples import EXAMPLES, commands_of
from support import REPO

PAGE = REPO / "man/firebuild.1"


def man_page(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/man-page"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_page_is_up_to_date() -> None:
    done = man_page("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_page_that_says_something_else_is_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "man/firebuild.1"
    assert man_page("--page", page).returncode == 0
    right = page.read_text()
    assert right == PAGE.read_text()
    page.write_text(right.replace("no\\-cache", "no\\-caching", 1))
    done = man_page("--check", "--page", page)
    assert done.returncode == 1
    assert any(line.startswith("+") and "no\\-cache" in line for line in done.stderr.splitlines())
    assert "run `make tables`" in done.stderr


@pytest.mark.needs("mandoc")
def test_mandoc_finds_nothing_wrong_in_it_and_shows_all_commands_options_and_examples() -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", str(PAGE)]
    lint = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, "")
    command = ["mandoc", "-T", "utf8", "-O", "width=500", str(PAGE)]
    raw = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = re.sub(".\b", "", raw)  # bold is each character twice
    lines = {line.strip() for line in text.splitlines()}
    for words, one in commands_of(app):
        if isinstance(one, click.Group):
            continue
        assert " ".join(("firebuild", *words)) in lines
        assert lines.issuperset(EXAMPLES[" ".join(words)])
        options = (name for each in one.params if not getattr(each, "hidden", False) for name in each.opts)
        assert all(name in text for name in options if name.startswith("-"))


@pytest.mark.needs("man")
def test_groff_has_no_warning_about_it() -> None:
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(PAGE)]
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFSEQ": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ""
