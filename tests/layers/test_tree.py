from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from firebuild_bootstrap.image.worker.__main__ import digest
from firebuild_bootstrap.layers.apply import UnpackReport, apply
from firebuild_bootstrap.layers.reader import LayerReader
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import WHITEOUT, Entry, LayerError, LayerWriter, write_layer
from firebuild_bootstrap.layers.tree import (
    UNMOUNTABLE,
    WHITEOUT_MARK,
    Files,
    TreeSource,
    check_names,
    data_regions,
    file_digest,
    statuses,
    tree_entries,
    upper_entries,
)


def packed(root: Path, newest: int | None = None) -> bytes:
    archive = io.BytesIO()
    write_layer(archive, tree_entries(str(root), newest=newest))
    return archive.getvalue()


def unpack(archive: bytes, target: Path) -> UnpackReport:
    with Root(str(target)) as root:
        return apply(LayerReader(io.BytesIO(archive)), root)


def copy(source: Path, target: Path) -> UnpackReport:
    with Root(str(target)) as root:
        return apply(TreeSource(tree_entries(str(source))), root)


def members(archive: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: member for member in tar.getmembers()}


def test_nothing_is_lost_on_the_way_through_an_archive(rich_tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "again"
    target.mkdir()
    unpack(packed(rich_tree), target)
    assert packed(target) == packed(rich_tree)
    assert os.getxattr(target / "file", "user.raw") == b"\xff\0=\nbinary"
    assert (target / "file").stat().st_nlink == 2


def test_nothing_is_lost_in_a_copy(rich_tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "again"
    target.mkdir()
    report = copy(rich_tree, target)
    assert report.foreign == report.attributes == 0
    assert digest(str(target), times=True) == digest(str(rich_tree), times=True)


def test_a_copy_that_can_not_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(FileNotFoundError):
        copy(tmp_path / "missing", tmp_path / "target")


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


def test_links_pipes_and_devices_with_several_names_are_one_thing_as_files_are(
    tmp_path: Path,
) -> None:
    (tree := tmp_path / "tree").mkdir()
    os.symlink("x", tree / "link1")
    os.mkfifo(tree / "pipe1")
    kinds = ["link", "pipe"]
    if os.geteuid() == 0:
        os.mknod(tree / "node1", 0o20666, os.makedev(1, 3))
        kinds.append("node")
    for kind in kinds:
        os.link(tree / f"{kind}1", tree / f"{kind}2", follow_symlinks=False)
    found = members(packed(tree))
    assert all(found[f"{kind}2"].islnk() and found[f"{kind}2"].linkname == f"{kind}1" for kind in kinds)
    (copy := tmp_path / "copy").mkdir()
    with Root(str(copy)) as root:
        apply(TreeSource(tree_entries(str(tree))), root, devices=True)
    for kind in kinds:
        assert os.path.samestat(os.lstat(copy / f"{kind}1"), os.lstat(copy / f"{kind}2"))
    assert packed(copy) == packed(tree)


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
    files = tree_entries(str(tmp_path))
    assert next(files)[0].path == ""
    (tmp_path / "a/b").rmdir()
    (tmp_path / "a").rmdir()
    with pytest.raises(LayerError, match="/a: No such file or directory"):
        next(files)


def test_a_file_system_without_attributes_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").touch()

    def unsupported(_: object) -> list[str]:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "listxattr", unsupported)
    assert [dict(entry.xattrs) for entry, _ in tree_entries(str(tmp_path))] == [{}, {}]


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> None:
    with open(path, "wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    os.utime(path, (5, 5))


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (0, ()),
        (1, ((0, b"x"),)),
        (5 << 20, ()),
        ((5 << 20) + 1, ((0, b"begin"), (3 << 20, b"middle"), (5 << 20, b"e"))),
        (3 << 20, ((1 << 20, bytes(1 << 20)), ((2 << 20) + 5, b"after zeros that are written"))),
    ],
)
def test_a_digest_counts_holes_as_zeros(
    tmp_path: Path, size: int, pieces: tuple[tuple[int, bytes], ...]
) -> None:
    sparse(tmp_path / "f", size, *pieces)
    with open(tmp_path / "f", "rb") as file:
        assert file_digest(file, "sha256") == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


def test_holes_go_by_content_and_not_by_how_the_file_was_written(tmp_path: Path) -> None:
    archives = []
    for name in ("holes", "zeros"):
        (tmp_path / name).mkdir()
        data = (1 << 20, b"x" * 5000)
        zeros = () if name == "holes" else ((0, bytes(3 << 20)),)
        sparse(tmp_path / name / "f", 3 << 20, *zeros, data)
        os.utime(tmp_path / name, (5, 5))
        archives.append(packed(tmp_path / name))
    assert archives[0] == archives[1]
    assert len(archives[0]) < 100_000


def test_terabytes_of_nothing_take_no_time_and_no_room(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "out").mkdir()
    size = 8 << 40
    sparse(tmp_path / "t/lastlog", size, (5 << 40, b"entry"))
    sparse(tmp_path / "t/empty", size)
    archive = packed(tmp_path / "t")
    assert len(archive) < 100_000
    copy(tmp_path / "t", tmp_path / "out")
    assert packed(tmp_path / "out") == archive
    assert (tmp_path / "out/lastlog").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_000])
def test_the_edges_of_holes_are_exact(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    sparse(path, size)
    with open(path, "rb") as file:
        assert data_regions(file.fileno(), size) == (() if size >= 65_536 else None)
    sparse(path, size, (size - 1, b"x"))
    with open(path, "rb") as file:
        start = (size - 1) // 65_536 * 65_536
        expected = None if start == 0 else ((start, size - start),)
        assert data_regions(file.fileno(), size) == expected


def test_a_copy_works_where_the_kernel_shares_no_blocks(
    rich_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between file systems of two kinds (copy_file_range(2), EXDEV)."""

    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refused)
    sparse(rich_tree / "sparse", 5 << 20, (2 << 20, b"x" * 100_000))
    (tmp_path / "again").mkdir()
    copy(rich_tree, tmp_path / "again")
    assert packed(tmp_path / "again") == packed(rich_tree)


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "t/f").write_bytes(b"x" * 1000)

    def shrinking() -> Files:
        for entry, content in tree_entries(str(tmp_path / "t")):
            (tmp_path / "t/f").write_bytes(b"x" * 10)
            yield entry, content

    with pytest.raises(LayerError, match="/f changed while it was read"), Root(str(tmp_path / "out")) as root:
        apply(TreeSource(shrinking()), root)


def test_an_error_of_the_disk_is_no_reason_to_copy_in_another_way(
    rich_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "again").mkdir()
    with pytest.raises(OSError, match="No space left"):
        copy(rich_tree, tmp_path / "again")


def test_the_archive_goes_out_in_pieces_and_never_as_a_whole(tmp_path: Path) -> None:
    class Sizes:
        def __init__(self) -> None:
            self.found: list[int] = []

        def write(self, data: bytes | bytearray | memoryview, /) -> None:
            self.found.append(len(data))

    (tmp_path / "large").write_bytes(os.urandom(5_000_000))
    for number in range(40):
        (tmp_path / f"small{number}").write_bytes(os.urandom(30_000))
    sizes = Sizes()
    written = write_layer(sizes, tree_entries(str(tmp_path)))
    assert sum(sizes.found) == written.size > 6_000_000
    assert max(sizes.found) <= 1 << 20


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 1000)
    for entry, content in tree_entries(str(tmp_path)):
        if entry.kind == "file":
            (tmp_path / "f").write_bytes(b"x" * 10)
            with pytest.raises(LayerError, match="/f changed while it was read"):
                LayerWriter(io.BytesIO()).add(entry, content)


def test_content_has_to_fit_its_entry() -> None:
    for content in (b"ab", b"abcd", io.BytesIO(b"ab")):
        with pytest.raises(LayerError, match="/f changed while it was read"):
            LayerWriter(io.BytesIO()).add(Entry("f", "file", size=3), content)


@pytest.mark.parametrize(
    "entry", [Entry("", "file"), Entry("a\0b", "directory"), Entry("l", "symlink", linkname="\0")]
)
def test_an_entry_without_a_name_is_refused(entry: Entry) -> None:
    with pytest.raises(LayerError, match="can't be the name of a file"):
        LayerWriter(io.BytesIO()).add(entry)


def test_a_file_with_too_many_holes_is_refused() -> None:
    regions = tuple((number * 131_072, 1) for number in range(500_001))
    with pytest.raises(LayerError, match="more than 500000 holes"):
        LayerWriter(io.BytesIO()).add(Entry("f", "file", size=1 << 50, regions=regions))


# --- the upper directory of an overlay ----------------------------------------------------------------


def changes(upper: Path) -> list[tuple[str, str]]:
    return [(entry.path, entry.kind) for entry, _ in upper_entries(str(upper))]


@pytest.mark.root
def test_what_an_overlay_removed_becomes_whiteouts_before_its_other_entries(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "d").mkdir(parents=True)
    (upper / "d/a").touch()
    (upper / "d/xattr").touch()
    os.setxattr(upper / "d/xattr", "trusted.overlay.whiteout", b"")
    os.mknod(upper / "d/node", 0o20000, os.makedev(0, 0))
    os.mknod(upper / "zero", 0o20666, os.makedev(1, 5))
    (upper / "again").mkdir()
    os.setxattr(upper / "again", "trusted.overlay.opaque", b"y")
    os.setxattr(upper / "again", "trusted.overlay.origin", b"?")
    assert changes(upper) == [
        ("", "directory"),
        ("again", "directory"),
        ("again", "opaque"),
        ("d", "directory"),
        ("d/node", "whiteout"),
        ("d/xattr", "whiteout"),
        ("d/a", "file"),
        ("zero", "character"),
    ]


def test_without_privileges_the_marks_are_attributes_of_users(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", "user.overlay.opaque", b"y")
    os.setxattr(tmp_path / "d", "user.kept", b"1")
    (tmp_path / "d/gone").touch()
    os.setxattr(tmp_path / "d/gone", "user.overlay.whiteout", b"")
    assert changes(tmp_path) == [
        ("", "directory"),
        ("d", "directory"),
        ("d", "opaque"),
        ("d/gone", "whiteout"),
    ]
    found = {entry.path: dict(entry.xattrs) for entry, _ in upper_entries(str(tmp_path))}
    assert found["d"] == {}  # of the mark
    assert [dict(entry.xattrs) for entry, _ in tree_entries(str(tmp_path))][1] == {"user.kept": b"1"}


@pytest.mark.parametrize("note", ["redirect", "metacopy"])
def test_an_upper_directory_that_refers_to_files_elsewhere_is_refused(tmp_path: Path, note: str) -> None:
    (tmp_path / "d").mkdir()
    os.setxattr(tmp_path / "d", f"user.overlay.{note}", b"/elsewhere")
    with pytest.raises(LayerError, match=f"overlay.{note}"):
        changes(tmp_path)


def test_a_file_whose_name_would_mean_a_whiteout_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".wh.x").touch()
    with pytest.raises(LayerError, match="can't be kept in a layer"):
        changes(tmp_path)
    assert len(packed(tmp_path)) > 0  # of a whole tree it is a file like any other


def test_a_reserved_name_is_found_at_any_depth_and_in_any_kind(tmp_path: Path) -> None:
    for name in ("a/b", "a/.why", "a/x.wh.", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(".wh.text")
    check_names(str(tmp_path))
    deep = tmp_path / "a"
    for _ in range(200):
        deep = deep / "d"
        deep.mkdir()
    makers: list[Callable[[Path], None]] = [Path.mkdir, Path.touch, os.mkfifo]
    for number, make in enumerate(makers):
        make(deep / f".wh.{number}")
        with pytest.raises(LayerError, match=rf"^/a/(d/){{200}}\.wh\.{number} can't be kept"):
            check_names(str(tmp_path))
        os.rename(deep / f".wh.{number}", deep / f"{number}")


@pytest.mark.parametrize("known", [0, 2])
def test_a_directory_of_many_names_gives_the_same_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    for number in range(3):
        deep = tmp_path / f"a{number}/b/c"
        deep.mkdir(parents=True)
        (deep / "file").write_bytes(b"content")
        os.link(deep / "file", deep / "name")
        (deep / "gone").touch()
        os.setxattr(deep / "gone", WHITEOUT_MARK, b"y")
    assert WHITEOUT not in dict(changes(tmp_path)).values(), "a mark means nothing where overlays are mounted"
    os.setxattr(tmp_path, UNMOUNTABLE, b"y")
    assert list(dict(changes(tmp_path)).values()).count(WHITEOUT) == 3
    expected = packed(tmp_path), changes(tmp_path), list(statuses(str(tmp_path)))
    monkeypatch.setattr("firebuild_bootstrap.layers.tree._KNOWN", known)
    monkeypatch.setattr("firebuild_bootstrap.layers.tree._HELD", 2)
    assert (packed(tmp_path), changes(tmp_path), list(statuses(str(tmp_path)))) == expected


@pytest.mark.root
def test_the_layer_of_an_overlay_turns_what_is_below_into_what_was_seen(tmp_path: Path) -> None:
    """On a real overlay, mounted as the local machine does it: in a user namespace of its own."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    lower = tmp_path / "lower"
    for name in ("etc/keep", "etc/gone", "opaque/a", "opaque/b", "turn/f", "usr/bin/x"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text(name)
    options = f"lowerdir={lower},upperdir={tmp_path}/upper,workdir={tmp_path}/work,userxattr"
    script = f"""
        mount -t overlay overlay -o {options} {tmp_path}/merged || exit 77
        cd {tmp_path}/merged
        rm etc/gone; rm -r opaque; mkdir opaque; touch opaque/c; rm -r turn; ln -s etc turn
        chmod 700 usr/bin/x; touch usr/bin/y; ln usr/bin/y usr/bin/z; truncate -s 1T etc/hole
        tar -c --numeric-owner --sort=name -S . > {tmp_path}/seen.tar
    """
    done = subprocess.run(["unshare", "-Urm", "sh", "-ec", script], capture_output=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"no overlay can be mounted here: {done.stderr!r}")
    assert done.returncode == 0, done.stderr
    layer = io.BytesIO()
    write_layer(layer, upper_entries(str(tmp_path / "upper")))
    layer.seek(0)
    (tmp_path / "seen").mkdir()
    with Root(str(lower)) as root:
        apply(LayerReader(layer, whiteouts=True), root)
    with Root(str(tmp_path / "seen")) as root, open(tmp_path / "seen.tar", "rb") as seen:
        apply(LayerReader(seen), root)
    assert digest(str(lower)) == digest(str(tmp_path / "seen"))
    assert not (lower / "etc/gone").exists()
    assert os.readlink(lower / "turn") == "etc"
