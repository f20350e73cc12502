"""The example in which machines know each other by their identities, with this host's Python in the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support import REPO, Firebuild

pytestmark = pytest.mark.needs("userns")


def python_base(root: Path) -> Path:
    """Make a root file system that has this Python and nothing else."""
    program = Path(os.path.realpath(sys._base_executable))  # type: ignore[attr-defined]
    library = Path(sysconfig.get_path("stdlib")).resolve()
    unused = shutil.ignore_patterns(
        "test", "tests", "idlelib", "*-packages", "__pycache__", "config-*", "*.a"
    )
    shutil.copytree(library, root / str(library)[1:], ignore=unused)
    for folder in (root / "usr/bin", root / str(program.parent)[1:]):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(program, root / str(program)[1:])
    (root / "usr/bin/python3").symlink_to(program)
    extensions = [*library.glob("lib-dynload/_ssl*"), *library.glob("lib-dynload/_socket*")]
    for binary in (program, *extensions):
        listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
        for path in re.findall(r"(/\S+) \(0x", listed):
            target = root / path[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    return root


def test_machines_of_one_ca_speak_to_each_other_and_no_others_do(tmp_path: Path) -> None:
    firebuild = Firebuild(tmp_path / "home")
    firebuild("base", "import", "python", python_base(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, REPO / "examples/identity/talk.py", "--base", "python"],
        env={**os.environ, **firebuild.environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    _, one, other, foreign = done.stdout.split("--- ")
    assert "ask: spiffe://example.org/db: you said: hello" in one
    assert "answer: spiffe://example.org/web: hello" in one
    assert "exit status 0 and 0" in one
    assert (
        "answer: refused: the peer is spiffe://example.org/other, expected spiffe://example.org/web" in other
    )
    assert "ask: refused: the peer has hung up" in other
    assert "answer: refused: " in foreign
    assert "CERTIFICATE_VERIFY_FAILED" in foreign
    assert foreign.rstrip().endswith("exit status 3 and 3")
    assert firebuild.leftovers() == []
