from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.image.trees import Trees, allocated, file_size
from firebuild_bootstrap.image.worker import __main__ as worker
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.layers.tree import OWNER_MARK
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Host, Runtime, Sandbox
from firebuild_bootstrap.sandbox.idmap import single
from layers.trees import dig
from support import privately

pytestmark = pytest.mark.needs("bwrap")
MakeTar = Callable[..., Path]


def test_a_file_that_is_not_there_takes_no_room(tmp_path: Path) -> None:
    assert file_size(tmp_path / "none") == 0


def test_a_tree_survives_the_trip_through_the_sandbox(rich_tree: Path, tmp_path: Path, trees: Trees) -> None:
    archive, again, copied = tmp_path / "o.tar", tmp_path / "again", tmp_path / "copied"
    packed = trees.pack(rich_tree, archive)
    assert packed.size == archive.stat().st_size
    for target in (again, copied):
        target.mkdir()
    assert trees.unpack(archive, again).foreign == 0
    trees.copy(rich_tree, copied)
    expected = trees.summary(rich_tree, times=True)
    assert trees.summary(again, times=True) == trees.summary(copied, times=True) == expected
    assert trees.pack(again, tmp_path / "p.tar").digest == packed.digest


def test_an_ext4_image_is_made_in_the_sandbox(rich_tree: Path, tmp_path: Path, trees: Trees) -> None:
    made = trees.ext4(rich_tree, tmp_path / "i", Ext4Options(size=20 * 2**20))
    assert made.size == (tmp_path / "i").stat().st_size == 20 * 2**20


@pytest.mark.needs("ids")
def test_with_one_owner_the_others_are_marks_and_no_foreign_setuid_is_on_the_disk(
    make_tar: MakeTar, tmp_path: Path, trees: Trees
) -> None:
    alone = Trees(Sandbox(single(Host.current(), "")))
    members = []
    for name, kind, mode in (
        ("folder", tarfile.DIRTYPE, 0o2750),
        ("folder/game", tarfile.REGTYPE, 0o6755),
        ("folder/link", tarfile.SYMTYPE, 0o777),
        ("folder/same", tarfile.LNKTYPE, 0o6755),
        ("wrong", tarfile.REGTYPE, 0o644),
    ):
        member = tarfile.TarInfo(name)
        member.uid, member.gid, member.mode, member.type = 5, 2**32 - 2, mode, kind
        member.linkname = "folder/game" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
        members.append(member)
    root, copy = tmp_path / "root", tmp_path / "copy"
    root.mkdir()
    copy.mkdir()
    report = alone.unpack(make_tar(*((member, b"") for member in members)), root)
    assert (report.foreign, report.stripped) == (1, 0)
    assert report.examples["foreign"] == [f"folder/link (5:{2**32 - 2})"]
    status = (root / "folder/game").stat()
    assert (status.st_uid, status.st_mode & 0o7777) == (os.getuid(), 0o755)
    os.setxattr(root / "wrong", OWNER_MARK, b"5:9999999999:4000")  # as a RUN may
    alone.copy(root, copy)

    def owners(trees: Trees, root: Path) -> dict[str, tuple[int, int, int]]:
        archive = tmp_path / "again.tar"
        archive.unlink(missing_ok=True)
        trees.pack(root, archive)
        with tarfile.open(archive) as tar:
            return {member.name.strip("/"): (member.uid, member.gid, member.mode) for member in tar}

    kept = (5, 2**32 - 2, 0o6755)
    here = owners(alone, root)
    assert here == owners(alone, copy)
    assert (here["folder"], here["folder/game"], here["folder/same"]) == ((*kept[:2], 0o2750), kept, kept)
    assert (here["folder/link"][0], here["wrong"]) == (0, (0, 0, 0o644))
    # Where there are others a mark means nothing: one of them could have made it.
    assert 5 not in {uid for uid, _, _ in owners(trees, root).values()}


def test_everything_is_removed_even_what_nobody_may_read(tmp_path: Path, trees: Trees) -> None:
    victim = tmp_path / "victim"
    (victim / "locked/inner").mkdir(parents=True)
    (victim / "locked/inner/file").touch()
    (victim / "link").symlink_to(tmp_path)
    (victim / "locked").chmod(0)
    trees.remove(victim)
    assert os.listdir(tmp_path) == []
    trees.remove(victim)


def test_very_deep_trees_are_removed(tmp_path: Path, trees: Trees) -> None:
    dig(tmp_path, 1500)
    trees.remove(tmp_path / "deep")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("depth", "name"), [(3, "short"), (20, "d" * 250)])
def test_the_size_of_a_tree_is_what_du_says(tmp_path: Path, depth: int, name: str) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    dig(tree, depth, name)
    (tree / "file").write_bytes(bytes(20_000))
    (tree / "same").hardlink_to(tree / "file")
    du = subprocess.run(["du", "-s", "--block-size=1", tree], capture_output=True, check=True)
    assert allocated(tree) + tree.stat().st_blocks * 512 == int(du.stdout.split()[0])
    remove_tree(tree)


def test_a_link_is_removed_and_not_what_it_names(tmp_path: Path, trees: Trees) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    trees.remove(tmp_path / "link")
    trees.remove(tmp_path / "dangling")
    assert os.listdir(tmp_path) == ["precious"]


def test_what_can_not_be_removed_is_named(trees: Trees) -> None:
    with pytest.raises(MachineError, match="/proc/version could not be removed"):
        trees.remove(Path("/proc/version"))


def test_a_damaged_archive_is_an_error_in_words(tmp_path: Path, trees: Trees) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    (tmp_path / "root").mkdir()
    with pytest.raises(MachineError, match=r"could not unpack .*a\.tar: the archive is damaged") as caught:
        trees.unpack(tmp_path / "a.tar", tmp_path / "root")
    assert caught.value.hint == "make or download it again"


def test_an_error_of_the_system_is_told_without_a_hint(tmp_path: Path, trees: Trees) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(MachineError, match=r"could not unpack .*root: '/other': Is a directory") as caught:
        trees.unpack(tmp_path / "root", tmp_path / "root")
    assert caught.value.hint is None


@pytest.mark.parametrize(
    ("script", "message"), [("import sys; sys.exit('boom')", "boom"), ("import os; os._exit(9)", "status 9")]
)
def test_a_worker_that_dies_is_reported(tmp_path: Path, trees: Trees, script: str, message: str) -> None:
    runtime = trees._runtime
    broken = Runtime(runtime.binds, (*runtime.python, "-c", script), runtime.env)
    with pytest.raises(MachineError, match=f"could not read .*{message}"):
        Trees(trees.sandbox, broken).summary(tmp_path)


def test_the_worker_answers_requests(
    rich_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(operation: str, **request: object) -> dict[str, object]:
        text = json.dumps({"operation": operation, **request})
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        worker.main()
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return answer

    archive, target, other = (str(tmp_path / name) for name in ("a.tar", "target", "other"))
    os.mkdir(target)
    os.mkdir(other)
    packed = ask("pack", root=str(rich_tree), archive=archive)
    assert packed["size"] == os.path.getsize(archive)
    assert ask("unpack", archive=archive, root=target)["members"] == packed["members"]
    assert ask("copy", source=target, target=other)["members"] == packed["members"]
    assert ask("digest", root=other) == ask("digest", root=str(rich_tree))
    assert ask("ext4", root=target, image=str(tmp_path / "i"), free=0)["size"]
    assert ask("unpack", archive="/nowhere", root=target)["error"] == "'/nowhere': No such file or directory"
    (tmp_path / "bad").write_bytes(b"bad" * 500)
    assert "damaged" in str(ask("unpack", archive=str(tmp_path / "bad"), root=target)["error"])


@pytest.mark.root
@pytest.mark.parametrize("read_only", [False, True])
def test_a_disk_that_takes_no_more_is_named(trees: Trees, tmp_path: Path, *, read_only: bool) -> None:
    tree, small = tmp_path / "tree", tmp_path / "small"
    for directory in (tree, small):
        directory.mkdir()
    (tree / "file").write_bytes(bytes(range(256)) * 4096)
    options, words = ("ro", "Read-only file system") if read_only else ("size=64k", "No space left on device")

    def work() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", small], check=True)
        with pytest.raises(MachineError, match=f"{small}.*{words}"):
            trees.pack(tree, small / "out.tar")

    privately(work)
