from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from firebuild_bootstrap.image.worker import ext4 as module
from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4, measure
from firebuild_bootstrap.image.worker.extfs import Ext4Image
from firebuild_bootstrap.image.worker.imagewalk import walk_image
from firebuild_bootstrap.layers.tar import LayerError

pytestmark = [pytest.mark.needs("mke2fs"), pytest.mark.needs("e2fsck")]
MIB = 2**20


def debugfs(image: Path, request: str) -> str:
    env = {"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"}
    return subprocess.run(
        ["debugfs", "-R", request, image], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_the_image_holds_the_tree_and_is_clean(rich_tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "i.ext4"
    make_ext4(str(rich_tree), str(image), Ext4Options())
    features = debugfs(image, "features")
    assert {"has_journal", "extent", "metadata_csum", "64bit"} <= set(features.split())
    assert "Type: symlink" in debugfs(image, "stat /link")
    status = debugfs(image, "stat /set")
    assert "Mode:  04755" in status
    assert "Links: 2" in debugfs(image, "stat /dir/same")
    assert "user.raw" in debugfs(image, "ea_list /file")
    if os.geteuid() == 0:
        assert "User:     7   Group:     8" in status
        assert "security.capability" in status


def test_the_guest_finds_the_free_space_it_was_promised(rich_tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "i.ext4"
    make_ext4(str(rich_tree), str(image), Ext4Options(free=32 * MIB))
    statistics = debugfs(image, "stats")
    free = int(statistics.split("Free blocks:")[1].split()[0]) * 4096
    assert 32 * MIB <= free < 48 * MIB


@pytest.mark.needs("debugfs")
def test_times_from_1901_to_2446_are_kept(tmp_path: Path) -> None:
    times = {"a": 15_022_195_200, "b": 4_102_444_800, "c": 2**31, "d": -1000, "e": 2**32, "f": 2**31 - 1}
    (tmp_path / "t/far").mkdir(parents=True)
    for name, seconds in times.items():
        (tmp_path / "t" / name).touch()
        os.utime(tmp_path / "t" / name, (seconds, seconds))
    os.symlink("a", tmp_path / "t/l")
    os.utime(tmp_path / "t/l", (2**33, 2**33), follow_symlinks=False)
    os.utime(tmp_path / "t/far", (2**33, 2**33))
    make_ext4(str(tmp_path / "t"), str(tmp_path / "i"), Ext4Options())
    image = Ext4Image(str(tmp_path / "i"))
    found = {path: inode.mtime_ns // 10**9 for path, inode in walk_image(image) if path}
    image.close()
    assert found == {**times, "l": 2**33, "far": 2**33}


def test_an_empty_tree_makes_an_image(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_ext4(str(tmp_path / "empty"), str(tmp_path / "i"), Ext4Options(free=0))
    assert "lost+found" in debugfs(tmp_path / "i", "ls /")


def test_a_size_is_kept(rich_tree: Path, tmp_path: Path) -> None:
    make_ext4(str(rich_tree), str(tmp_path / "large"), Ext4Options(size=300 * MIB))
    assert (tmp_path / "large").stat().st_size == 300 * MIB
    assert (tmp_path / "large").stat().st_blocks * 512 < 64 * MIB


def test_a_size_that_is_too_small_is_an_error_with_the_size_that_is_not(
    rich_tree: Path, tmp_path: Path
) -> None:
    (rich_tree / "data").write_bytes(os.urandom(12 * MIB))
    for size in (1, 10 * MIB):
        with pytest.raises(
            LayerError, match=r"the files need size=\d+MiB, found size=(0|10240)KiB"
        ) as caught:
            make_ext4(str(rich_tree), str(tmp_path / "i"), Ext4Options(size=size))
        assert caught.value.asked
        assert list(tmp_path.glob("i*")) == []
    least = int(caught.value.hint.split("size=")[1].split("MiB")[0]) * MIB
    make_ext4(str(rich_tree), str(tmp_path / "i"), Ext4Options(size=least))
    assert (tmp_path / "i").stat().st_size == least


def test_with_an_epoch_the_same_tree_gives_the_same_image(rich_tree: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_ext4(str(rich_tree), str(tmp_path / name), Ext4Options(epoch=1_600_000_000, free=0))
        os.utime(rich_tree / "empty", ns=(os.stat(rich_tree / "empty").st_mtime_ns + 5,) * 2)
        os.utime(rich_tree / "empty", ns=(0, os.stat(rich_tree / "empty").st_mtime_ns - 5))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_without_room_it_is_tried_with_more(
    rich_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rich_tree / "data").write_bytes(os.urandom(8 * MIB))
    monkeypatch.setattr(module, "_initial_size", lambda *_: 6 * MIB)
    make_ext4(str(rich_tree), str(tmp_path / "i"), Ext4Options())
    assert (tmp_path / "i").stat().st_size > 8 * MIB


def test_room_is_not_sought_for_ever(
    rich_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rich_tree / "data").write_bytes(os.urandom(24 * MIB))
    monkeypatch.setattr(module, "_initial_size", lambda *_: 2 * MIB)
    with pytest.raises(LayerError, match=r"no room for the tree in \d+ MiB"):
        make_ext4(str(rich_tree), str(tmp_path / "i"), Ext4Options())
    assert not (tmp_path / "i").exists()


def test_another_complaint_of_mke2fs_is_passed_on(rich_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match=r"mke2fs failed: .*No such file or directory"):
        make_ext4(str(rich_tree), str(tmp_path / "missing/i"), Ext4Options(free=0))


def test_a_damaged_image_is_not_accepted(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    make_ext4(str(tmp_path / "t"), str(tmp_path / "i"), Ext4Options(free=0))
    data = bytearray((tmp_path / "i").read_bytes())
    data[1024 + 16 : 1024 + 20] = b"\1\2\3\4"
    (tmp_path / "i").write_bytes(data)
    with pytest.raises(LayerError, match="e2fsck is not content"):
        module._check(str(tmp_path / "i"))
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(LayerError, match="debugfs could not finish"):
        module._debugfs(str(tmp_path / "missing" / "junk"), module._environment(None), ["stat <2>"])


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(LayerError, match="the program mke3fs was not found") as caught:
        module._run(["mke3fs"], {"PATH": "/usr/bin"})
    assert caught.value.hint == "install the package e2fsprogs"


def test_the_measure_counts_blocks_and_each_inode_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 4097)
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "short").symlink_to("x")
    (tmp_path / "long").symlink_to("x" * 60)
    names = 5 * 12 + len("ablongshort")
    found = measure(str(tmp_path))
    assert (found.content, found.inodes, found.far_times) == (4096 + 8192 + 4096 + names, 4, {})
