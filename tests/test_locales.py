"""The locale decides nothing about the names of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import BIN

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.needs("userns")
def test_a_build_has_the_same_names_of_files_in_every_locale(tmp_path: Path) -> None:
    context = tmp_path / "größe"
    context.mkdir()
    (context / "漢字").touch()
    (context / "Dockerfile").write_text("FROM scratch\nCOPY 漢字 /größe/\nCOPY . /all\n")
    said = []
    for number, more in enumerate(({}, ASCII)):
        environ = {
            **os.environ,
            **more,
            "FIREBUILD_HOME": str(tmp_path / str(number)),
            "SOURCE_DATE_EPOCH": "0",
        }
        command = [str(BIN / "firebuild"), "build", "--quiet", str(context)]
        said.append(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("more", "options", "expected"),
    [
        ({}, [], "utf-8"),
        (ASCII, [], "utf-8"),
        (ASCII, ["-E"], "utf-8"),
        (ASCII, ["-X", "utf8=0"], "ascii"),  # whoever says so has it, and no endless restart
    ],
)
def test_a_program_restarts_once_where_the_locale_is_not_utf8(
    more: dict[str, str], options: list[str], expected: str
) -> None:
    script = (
        "import sys; from firebuild_bootstrap.locales import ensure_utf8; ensure_utf8();"
        "print(sys.getfilesystemencoding(), *map(ascii, sys.argv[1:]))"
    )
    command = [sys.executable, *options, "-c", script, "größe", "a\udcffb"]
    done = subprocess.run(command, env=os.environ | more, check=True, capture_output=True, text=True)
    encoding, *arguments = done.stdout.split()
    assert encoding == expected
    if expected == "utf-8":
        assert arguments == [ascii("größe"), ascii("a\udcffb")]
