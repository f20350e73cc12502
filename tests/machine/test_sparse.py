"""Drives have holes, which copies keep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import Interrupted, MachineError
from firebuild_bootstrap.machine.external.drive import copy_sparse


def test_copies_keep_data_and_holes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(200 << 20)
        for place in (0, 70 << 20, (150 << 20) - 5):
            file.seek(place)
            file.write(b"data" * 1000)
    copy_sparse(source, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "copy").stat().st_mode & 0o7777 == 0o600


def test_an_interrupted_copy_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 10)

    def check() -> None:
        raise Interrupted("enough")

    with pytest.raises(Interrupted):
        copy_sparse(tmp_path / "source", tmp_path / "copy", check)
    assert os.listdir(tmp_path) == ["source"]


def test_what_can_not_be_copied_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"source can't be copied to .*: No such file"):
        copy_sparse(tmp_path / "source", tmp_path / "target")
