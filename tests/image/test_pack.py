from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from firebuild_bootstrap.image.worker import pack as module
from firebuild_bootstrap.image.worker.digest import digest, listing
from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.pack import copy, pack
from firebuild_bootstrap.image.worker.unpack import unpack
from firebuild_bootstrap.image.worker.walk import Node, walk


def packed(root: Path, newest: int | None = None) -> bytes:
    archive = io.BytesIO()
    pack(str(root), archive, newest=newest)
    return archive.getvalue()


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_nothing_is_lost_on_the_way_through_an_archive(rich_tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "again"
    target.mkdir()
    unpack(io.BytesIO(packed(rich_tree)), str(target))
    assert list(listing(str(target), times=True)) == list(listing(str(rich_tree), times=True))
    assert os.getxattr(target / "file", "user.raw") == b"\xff\0=\nbinary"
    assert (target / "file").stat().st_nlink == 2


def test_nothing_is_lost_in_a_copy(rich_tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "again"
    target.mkdir()
    report = copy(str(rich_tree), str(target))
    assert report.foreign == report.attributes == 0
    assert digest(str(target), times=True) == digest(str(rich_tree), times=True)


def test_a_copy_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError):
        copy(str(tmp_path / "missing"), str(tmp_path / "target"))


def test_a_copy_that_can_not_be_written_is_the_writers_error(rich_tree: Path) -> None:
    (rich_tree / "dir/inner").write_bytes(b"x" * 10_000_000)
    with pytest.raises(OSError, match="No such file") as caught:
        copy(str(rich_tree), "/proc")  # where nobody can make anything
    assert not isinstance(caught.value, BrokenPipeError)


def test_the_same_tree_gives_the_same_archive_in_whatever_order_it_was_made(tmp_path: Path) -> None:
    archives = []
    for number, names in enumerate((("a", "b", "ä", "Z"), ("Z", "ä", "b", "a"))):
        root = tmp_path / str(number)
        root.mkdir()
        for name in names:
            (root / name).write_text(name)
            os.utime(root / name, (0, 1000))
        os.utime(root, (0, 1000))
        archives.append(packed(root))
    assert archives[0] == archives[1]
    assert list(members(archives[0])) == [".", "Z", "a", "b", "ä"]


def test_owners_are_numbers_and_no_names_of_the_host(rich_tree: Path) -> None:
    for entry in members(packed(rich_tree)).values():
        assert (entry.uname, entry.gname) == ("", "")


def test_times_can_be_limited_for_reproducible_archives(rich_tree: Path) -> None:
    limited = members(packed(rich_tree, newest=1_400_000_000))
    assert limited["file"].mtime == 1_400_000_000
    assert limited["dir"].mtime == 1_300_000_000


def test_hard_links_are_stored_once(rich_tree: Path) -> None:
    found = members(packed(rich_tree))
    assert found["dir/same"].isreg()
    assert found["file"].islnk()
    assert found["file"].linkname == "dir/same"


def test_sockets_are_left_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        assert list(members(packed(tmp_path))) == ["."]


@pytest.mark.root
def test_devices_are_packed_and_told_apart(tmp_path: Path) -> None:
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 3))
    found = members(packed(tmp_path))["null"]
    assert (found.ischr(), found.devmajor, found.devminor) == (True, 1, 3)
    before = digest(str(tmp_path))
    os.unlink(tmp_path / "null")
    os.mknod(tmp_path / "null", 0o20666, os.makedev(1, 5))
    assert digest(str(tmp_path)) != before


@pytest.mark.parametrize("change", ["content", "mode", "xattr", "link", "name"])
def test_the_digest_notices_every_change_but_times_only_when_asked(rich_tree: Path, change: str) -> None:
    before, with_times = digest(str(rich_tree)), digest(str(rich_tree), times=True)
    os.utime(rich_tree / "file", (1, 1))
    assert digest(str(rich_tree)) == before
    assert digest(str(rich_tree), times=True) != with_times
    match change:
        case "content":
            (rich_tree / "empty").write_text("x")
        case "mode":
            (rich_tree / "empty").chmod(0o600)
        case "xattr":
            os.setxattr(rich_tree / "file", "user.raw", b"other")
        case "link":
            (rich_tree / "link").unlink()
            (rich_tree / "link").symlink_to("/etc/group")
        case "name":
            (rich_tree / "empty").rename(rich_tree / "full")
    assert digest(str(rich_tree)) != before


def test_a_vanished_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    nodes = walk(str(tmp_path))
    assert [next(nodes).path, next(nodes).path] == ["", "a"]
    (tmp_path / "a/b").rmdir()
    (tmp_path / "a").rmdir()
    with pytest.raises(TreeError, match="/a: No such file or directory"):
        next(nodes)


def test_a_file_system_without_attributes_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").touch()

    def unsupported(_: object) -> list[str]:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "listxattr", unsupported)
    assert [node.xattrs() for node in walk(str(tmp_path))] == [{}, {}]


def test_an_unknown_kind_of_file_is_left_out(tmp_path: Path) -> None:
    status = os.stat_result((0o150644, *tmp_path.stat()[1:]))
    assert module._member(Node("odd", "odd", -1, status), None) is None
