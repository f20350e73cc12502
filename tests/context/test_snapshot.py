"""Files of a finished root come out of its archive, whatever its links say."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from firebuild_bootstrap.context.snapshot import SnapshotRoot
from firebuild_bootstrap.errors import MachineError


def member(name: str, kind: bytes = tarfile.REGTYPE, **members: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in members.items():
        setattr(info, key, value)
    return info


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for each in members:
            info, content = each if isinstance(each, tuple) else (each, b"")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def content(root: SnapshotRoot, path: str) -> bytes:
    with root.open(path.split("/")) as file:
        return file.read()


def test_files_have_their_owner_mode_time_and_content(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "t",
        member("./usr", tarfile.DIRTYPE, mode=0o750, uid=3, gid=4),
        (
            member("./usr/tool", mode=0o4755, uid=7, gid=8, pax_headers={"mtime": "12.000000034"}),
            b"tool" * 999,
        ),
        (member("lonely/deep/file"), b"no directory was listed"),
    )
    root = SnapshotRoot(made)
    tool = root.node(("usr", "tool")).status
    assert (tool.st_uid, tool.st_gid, stat.S_IMODE(tool.st_mode)) == (7, 8, 0o4755)
    assert (tool.st_size, tool.st_mtime_ns) == (3996, 12_000_000_034)
    assert root.node(("usr",)).is_directory
    assert [node.path for node in root.children(())] == ["lonely", "usr"]
    assert content(root, "usr/tool") == b"tool" * 999
    assert content(root, "lonely/deep/file") == b"no directory was listed"
    root.close()
    root.close()


def test_links_stay_inside(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "t",
        (member("etc/passwd"), b"the image's own"),
        member("up", tarfile.SYMTYPE, linkname="../../../etc/passwd"),
        member("absolute", tarfile.SYMTYPE, linkname="/etc"),
        member("loop", tarfile.SYMTYPE, linkname="loop"),
    )
    root = SnapshotRoot(made)
    assert root.resolve(("up",), lambda _: True).path == "etc/passwd"
    assert root.resolve(("absolute", "passwd"), lambda _: True).path == "etc/passwd"
    with pytest.raises(OSError, match="loop"):
        root.resolve(("loop",), lambda _: True)


def test_names_of_one_file_are_known_as_such(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "t",
        (member("first"), b"content"),
        member("bin/second", tarfile.LNKTYPE, linkname="./first"),
        (member("other"), b"content"),
    )
    root = SnapshotRoot(made)
    first, second = root.node(("first",)).status, root.node(("bin", "second")).status
    assert (first.st_ino, first.st_nlink) == (second.st_ino, second.st_nlink) == (first.st_ino, 2)
    assert root.node(("other",)).status.st_ino != first.st_ino
    assert content(root, "bin/second") == b"content"


def test_a_later_member_replaces_an_earlier_one(tmp_path: Path) -> None:
    made = archive(
        tmp_path / "t",
        (member("a"), b"old"),
        (member("d/below"), b"kept"),
        (member("a"), b"new"),
        member("d", tarfile.DIRTYPE, mode=0o700),
    )
    root = SnapshotRoot(made)
    assert content(root, "a") == b"new"
    assert content(root, "d/below") == b"kept"
    assert stat.S_IMODE(root.node(("d",)).status.st_mode) == 0o700
    assert [node.path for node in root.children(())] == ["a", "d"]


def test_an_archive_that_leads_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="leads out of the tree"):
        SnapshotRoot(archive(tmp_path / "t", (member("../outside"), b"has no place")))


@pytest.mark.parametrize("target", ["d", "."])
def test_a_directory_can_t_be_made_to_hold_itself(tmp_path: Path, target: str) -> None:
    made = archive(
        tmp_path / "t", member("d", tarfile.DIRTYPE), member("d/again", tarfile.LNKTYPE, linkname=target)
    )
    with pytest.raises(MachineError, match="'d/again' is a hard link to a directory"):
        SnapshotRoot(made)


def test_holes_are_zeros(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        for offset in (0, 1 << 20, 5 << 20):
            file.seek(offset)
            file.write(b"data")
        file.truncate(9 << 20)
    subprocess.run(["tar", "-C", tmp_path, "-cSf", tmp_path / "t", "--format=pax", "sparse"], check=True)
    assert (tmp_path / "t").stat().st_size < 1 << 20
    root = SnapshotRoot(tmp_path / "t")
    assert content(root, "sparse") == (tmp_path / "sparse").read_bytes()
    regions = root.regions(["sparse"])
    assert regions is not None
    stored = b"".join(root.stored(["sparse"]))
    assert len(stored) == sum(length for _, length in regions) < 1 << 20
    assert stored.replace(b"\0", b"") == b"datadatadata"


def test_what_is_not_there_is_an_error_as_of_a_directory(tmp_path: Path) -> None:
    root = SnapshotRoot(archive(tmp_path / "t", (member("file"), b"")))
    for parts in (("none",), ("file", "below")):
        with pytest.raises(OSError, match="/".join(parts)):
            root.node(parts)
    empty = SnapshotRoot(None)
    assert empty.children(()) == []
    empty.close()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for damaged in (
        b"no archive at all" * 100,
        archive(tmp_path / "x", (member("a"), b"b" * 5000)).read_bytes()[:2000],
    ):
        (tmp_path / "t").write_bytes(damaged)
        with pytest.raises(MachineError, match="can't be read"):
            SnapshotRoot(tmp_path / "t")
    os.unlink(tmp_path / "t")
    with pytest.raises(MachineError, match="No such file"):
        SnapshotRoot(tmp_path / "t")
