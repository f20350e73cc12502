"""`firebuild plugin new`: the begin of somebody's provider."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.conftest import Cli


def test_a_new_project_is_written_and_the_next_steps_are_named(cli: Cli) -> None:
    done = cli("plugin", "new", "step", "--dir", "my plugins")
    project = Path("my plugins/firebuild-pki-step")
    assert (project / "pyproject.toml").exists()
    assert done.out == (
        f"wrote {project}\n\nTry it:\n  cd '{project}'\n  pip install -e . pytest\n  pytest\n"
        "  firebuild ca check --ca step\n"
    )


def test_the_name_may_be_that_of_the_distribution(cli: Cli) -> None:
    assert cli("plugin", "new", "firebuild-pki-step").out.endswith("  firebuild ca check --ca step\n")
    assert Path("firebuild-pki-step").is_dir()


@pytest.mark.parametrize("name", ["Step", "embedded", "provider"])
def test_a_name_that_cannot_be_used_is_bad_input(cli: Cli, name: str) -> None:
    done = cli("plugin", "new", name, status=2)
    assert f'"{name}"' in done.err
    assert list(Path().iterdir()) == []


def test_a_project_is_never_overwritten(cli: Cli) -> None:
    cli("plugin", "new", "step")
    assert "not empty" in cli("plugin", "new", "step", status=2).err
