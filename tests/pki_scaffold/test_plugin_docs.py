"""docs/plugins.md says what is true."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from firebuild_pki import API_VERSION, CAProvider, NoteLevel
from firebuild_pki.provider import RESERVED_NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
PLUGIN = ROOT / "plugins" / "firebuild-pki-cfssl"


def blocks(text: str, language: str) -> list[str]:
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


WALK = section("A real one: cfssl")


@pytest.mark.parametrize("excerpt", blocks(WALK, "python") + blocks(WALK, "toml"))
def test_what_is_quoted_of_the_plugin_is_in_it(excerpt: str) -> None:
    sources = [*PLUGIN.rglob("*.py"), PLUGIN / "pyproject.toml"]
    assert any(excerpt in path.read_text() for path in sources)


def test_the_walk_names_files_that_exist() -> None:
    for name in ("settings.py", "provider.py", "refusals.py", "client.py"):
        assert f"(`{name}`)" in WALK
        assert (PLUGIN / "src" / "firebuild_pki_cfssl" / name).exists()


def test_every_method_of_a_provider_is_listed() -> None:
    table = section("The contract on one page")
    methods = [name for name in vars(CAProvider) if not name.startswith("_")]
    assert len(methods) > 5
    for name in methods:
        assert f"\n| `{name}(" in table


def test_the_levels_of_notes_are_listed() -> None:
    for level in NoteLevel:
        assert f"`{level.name}`" in section("The contract on one page")


def test_the_reserved_names_and_the_version_are_those_of_the_code() -> None:
    found = section("How plugins are found")
    assert ", ".join(f"`{name}`" for name in sorted(RESERVED_NAMES)) in " ".join(found.split())
    assert f"`API_VERSION`, now {API_VERSION}." in " ".join(found.split())


def test_the_observer_in_the_documentation_works(tmp_path: Path) -> None:
    info = tmp_path / "counter-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counter\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[firebuild_pki.observers]\ncounter = counter_plugin\n")
    (tmp_path / "counter_plugin.py").write_text(blocks(section("An observer"), "python")[0])
    log = tmp_path / "log"
    program = f"""
        from firebuild_pki import open_authority
        settings = {{"observers": ["counter"], "counter": {{"path": {json.dumps(str(log))}}}}}
        with open_authority(settings, build_id="b1") as authority:
            authority.issue_server()
            assert authority.warnings == ()
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = log.read_text().splitlines()
    assert " b1 " in line
    assert line.endswith(" b1.firebuild.internal")
