"""`firebuild initramfs build`, as a user calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs.conftest import alone
from support import Firebuild


@pytest.fixture
def firebuild(store: Path, initramfs: Path) -> Firebuild:
    """The command on the tests' own store, which has an initramfs already."""
    return Firebuild(store)


def test_it_prints_where_the_initramfs_is_and_how_large(firebuild: Firebuild, initramfs: Path) -> None:
    path, _, size = firebuild("initramfs", "build").stdout.strip().partition("  ")
    assert Path(path) == initramfs
    assert size.endswith(" MiB")


def test_it_writes_a_file_and_replaces_an_older_one(
    firebuild: Firebuild, initramfs: Path, tmp_path: Path
) -> None:
    (tmp_path / "initramfs.zst").write_text("older")
    with alone(firebuild.home):
        done = firebuild("initramfs", "build", "--output", tmp_path / "initramfs.zst")
    assert done.stdout.startswith(f"{tmp_path}/initramfs.zst  ")
    assert (tmp_path / "initramfs.zst").read_bytes() == initramfs.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["initramfs.zst"]


def test_mistakes_are_told_in_words(firebuild: Firebuild, tmp_path: Path) -> None:
    empty = firebuild("initramfs", "build", "--kernel-modules", tmp_path, status=2)
    assert "holds no kernel modules" in empty.stderr
    nowhere = firebuild("initramfs", "build", "-o", tmp_path / "no/where", status=2)
    assert f"{tmp_path / 'no'} is not a directory" in nowhere.stderr
    assert "zstd" in firebuild("initramfs", "build", "--compress", "xz", status=2).stderr
