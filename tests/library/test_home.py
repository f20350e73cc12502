"""`Home`: the directory and the tools that work in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import Interrupted, MachineError
from firebuild_bootstrap.home import Home, IdChoice
from firebuild_bootstrap.sandbox import detect

pytestmark = pytest.mark.needs("userns")


def test_nothing_is_made_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    monkeypatch.setattr(Home, "trees", property(lambda self: pytest.fail("a sandbox is not needed")))
    assert home.bases.list() == []
    assert home.images.list() == []
    home.close()
    assert not home.root.exists()


def test_a_directory_stays_where_it_is_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    home = Home(Path("home"))
    monkeypatch.chdir("elsewhere")
    with home.workspace("b1") as workspace:
        assert workspace.path == tmp_path / "home/builds/b1"


def test_the_best_mapping_is_chosen_and_can_be_demanded(tmp_path: Path) -> None:
    best: IdChoice = detect().mode.value
    assert Home(tmp_path).idmap.mode.value == best
    assert Home(tmp_path, ids=best).idmap.mode.value == best


def test_a_single_id_can_always_be_had(tmp_path: Path) -> None:
    idmap = Home(tmp_path, ids="single").idmap
    assert idmap.mode.value == "single"
    assert idmap.note


def test_a_mapping_that_cannot_be_had_is_refused_with_a_remedy(tmp_path: Path) -> None:
    others: dict[str, IdChoice] = {"full": "subids", "subids": "full", "single": "full"}
    other = others[detect().mode.value]
    with pytest.raises(MachineError, match=f"machine.ids is {other}, but for this user") as caught:
        _ = Home(tmp_path, ids=other).idmap
    assert caught.value.hint


def test_a_workspace_is_private_and_gone_at_its_end(tmp_path: Path) -> None:
    with Home(tmp_path).workspace("b1") as workspace:
        assert workspace.path == tmp_path / "builds/b1"
        assert workspace.path.stat().st_mode & 0o777 == 0o700
    assert not workspace.path.exists()


def test_long_work_on_trees_can_be_interrupted(tmp_path: Path) -> None:
    def check() -> None:
        raise Interrupted("enough")

    (tmp_path / "tree").mkdir()
    with (tmp_path / "tree/file").open("wb") as file:
        for _ in range(512):
            file.write(b"no hole" * 150_000)  # which would be over in no time
    home = Home(tmp_path / "home", check=check)
    with pytest.raises(Interrupted):
        home.bases.import_base("tiny", tmp_path / "tree")
    assert Home(tmp_path / "home").bases.list() == []
