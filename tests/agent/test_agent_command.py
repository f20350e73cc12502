"""`firebuild agent build`, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.conftest import alone
from support import Firebuild


@pytest.fixture
def firebuild(store: Path, agent: Path) -> Firebuild:
    """The command on the tests' own store, which has an agent already."""
    return Firebuild(store)


def test_it_prints_where_the_agent_is_and_how_large(firebuild: Firebuild, agent: Path) -> None:
    path, _, size = firebuild("agent", "build").stdout.strip().partition("  ")
    assert Path(path) == agent
    assert size.endswith(" MiB")


def test_it_writes_a_file_and_replaces_an_older_one(
    firebuild: Firebuild, agent: Path, tmp_path: Path
) -> None:
    (tmp_path / "agent.zst").write_text("older")
    with alone(firebuild.home):
        done = firebuild("agent", "build", "--output", tmp_path / "agent.zst")
    assert done.stdout.startswith(f"{tmp_path}/agent.zst  ")
    assert (tmp_path / "agent.zst").read_bytes() == agent.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["agent.zst"]


def test_mistakes_are_told_in_words(firebuild: Firebuild, tmp_path: Path) -> None:
    empty = firebuild("agent", "build", "--kernel-modules", tmp_path, status=2)
    assert "holds no kernel modules" in empty.stderr
    nowhere = firebuild("agent", "build", "-o", tmp_path / "no/where", status=2)
    assert f"{tmp_path / 'no'} is no directory" in nowhere.stderr
    assert "zstd" in firebuild("agent", "build", "--compress", "xz", status=2).stderr
