"""Files that come packed: what is refused of them, and what makes them worth it."""

from __future__ import annotations

import os
import resource
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.errors import StepError
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.root import ResolvedPath, Root
from guest.build import DEFAULT_ACL, workdir_command
from guest.local import Local
from guest.server import END, group, member, piece

pytestmark = pytest.mark.root

TREE = group(from_directory=True)
ONE = group()


def test_holes_stay_holes_also_where_a_file_is_replaced(local: Local) -> None:
    size = 1 << 40
    regions = ((1 << 20, 4), (1 << 30, 4))
    entry = tar.Entry("big", tar.FILE, 0o640, size=size, regions=regions)
    data = tar.encode(entry, 8)[0] + b"oncemore" + bytes(504)
    (local.image / "old").write_text("old")
    for target in ("/new", "/old"):
        local.copy([ONE, piece(data), END], target)
        with open(local.image / target[1:], "rb") as file:
            assert file.seek(1 << 20) == 1 << 20
            assert file.read(6) == b"once\0\0"
            assert os.pread(file.fileno(), 8, (1 << 30) - 2) == b"\0\0more\0\0"
            status = os.fstat(file.fileno())
        assert (status.st_size, status.st_mode & 0o777) == (size, 0o640)
        assert status.st_blocks * 512 < 1 << 20


def test_an_empty_resource_is_no_error(local: Local) -> None:
    local.copy([], "/target/")
    assert local.tree() == {}


def test_attributes_and_special_files_arrive(local: Local) -> None:
    def attributed(entry: tar.Entry, content: bytes = b"") -> bytes:
        xattrs = {"user.note": b"kept", "user.empty": b"", "no-namespace": b"refused by the kernel"}
        # An overlay would take a directory for one that hides those below, and its packing stop.
        xattrs |= {f"{name}": b"y" for name in ("user.overlay.opaque", "trusted.overlay.redirect")}
        return tar.encode(entry._replace(xattrs=xattrs), len(content))[0] + content.ljust(
            512 if content else 0, b"\0"
        )

    os.mkfifo(local.image / "old")
    (local.image / "link").symlink_to("nowhere")
    fifo = tar.Entry("p", tar.FIFO, 0o622, mtime_ns=5 * 10**9)
    stream = (
        attributed(tar.Entry("d", tar.DIRECTORY, 0o755)),
        attributed(tar.Entry("d/f", tar.FILE, 0o640, size=1), b"x"),
        tar.encode(fifo, 0)[0],
    )
    local.copy([TREE, piece(b"".join(stream)), END], "/t")
    for name in ("t/d", "t/d/f"):
        assert {key: os.getxattr(local.image / name, key) for key in os.listxattr(local.image / name)} == {
            "user.note": b"kept",
            "user.empty": b"",
        }
    for target in ("/old", "/link"):
        local.copy([ONE, piece(stream[2]), END], target)
    for name in ("t/p", "old", "nowhere"):
        status = os.lstat(local.image / name)
        assert (status.st_mode, status.st_mtime) == (stat.S_IFIFO | 0o622, 5)


def test_a_device_node_is_made_or_it_is_said_why_not(local: Local) -> None:
    device = piece(tar.encode(tar.Entry("null", tar.CHARACTER, 0o666, device=(1, 3)), 0)[0])
    with suppress(StepError):  # the message is the one below
        local.copy([ONE, device, END], "/null")
        status = os.lstat(local.image / "null")
        assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (local.image / "sealed").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mknod", refuse)
        message = local.refused([ONE, device, END], "/sealed/").message
    assert "/sealed/null is a device node (1:3), which can't be made here" in message


def test_pieces_may_end_anywhere(local: Local) -> None:
    content = os.urandom(5000).hex().encode()
    data = (
        member("d", kind=tar.DIRECTORY)
        + member("d/f", content)
        + member("d/l", kind=tar.SYMLINK, linkname="f")
    )
    cut = [piece(data[at : at + 333]) for at in range(0, len(data), 333)]
    local.copy([TREE, *cut[:7], piece(b""), *cut[7:], END], "/t")
    assert local.tree() == {"t": "dir", "t/d": "dir", "t/d/f": content.decode(), "t/d/l": "-> f"}


FILE = member("f", b"content")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([TREE, piece(FILE)], "does not end where it says so"),
        ([TREE, piece(FILE[:300])], "can't be read: "),
        ([TREE, piece(FILE), END, piece(b"more")], "does not end where it says so"),
        ([TREE, piece(FILE), pb.ToGuest(), END], "the server sent nothing in the middle of files"),
        ([TREE, pb.ToGuest(finish=pb.Finish()), END], "the server sent finish before the last step was done"),
        ([TREE, piece(member("../up", b"x")), END], "can't be read: "),
        (
            [group(from_directory=True, keep_owner=True), piece(member("f", uid=2**32 - 1)), END],
            "f: the server sent the owner 4294967295:0",
        ),
        ([TREE, piece(member("f", b"", size=2**62)), END], "can't be read: unexpected end of data"),
    ],
)
def test_what_a_packed_stream_must_not_be(local: Local, stream: list[pb.ToGuest], message: str) -> None:
    error = local.refused(stream)
    assert message in error.message
    assert error.reason == "protocol"
    assert "up" not in os.listdir(local.image)


def test_a_file_that_is_not_complete_is_removed_again(local: Local) -> None:
    local.refused([TREE, piece(member("f", b"", size=2_000_000)[:512] + bytes(1_000_000))], "/t")
    assert local.tree() == {"t": "dir"}


def test_missing_parents_are_each_made_from_the_one_above(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the top, their number would count twice: minutes, where thousands are missing."""
    walks = []
    locate = Root.locate

    def counted(root: Root, path: str, **options: Any) -> ResolvedPath:
        walks.append(path)
        return locate(root, path, **options)

    monkeypatch.setattr(Root, "locate", counted)
    local.copy([TREE, piece(member("/".join("d" * 400) + "/f", b"F")), END], "/t", chown="7:8")
    assert len(walks) < 10
    made = Path(local.image, "t", *"d" * 400)
    assert (made / "f").read_text() == "F"
    assert local.owner("t/d/d") == (7, 8)
    assert local.mode("t/d/d") == 0o755


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([tar.Entry(f"d{number}", tar.DIRECTORY, 0o755) for number in range(20)], "too many directories"),
        ([tar.Entry("d", tar.DIRECTORY, 0o755, xattrs={"user.x": bytes(9000)})], "too many directories"),
        ([tar.Entry("/".join("d" * 20), tar.FIFO, 0o644)], "too many directories"),
        ([tar.Entry("/".join("d" * 1000), tar.FIFO, 0o644)], "is too deep: more than 11 directories"),
    ],
)
def test_directories_of_a_copy_are_bounded(
    local: Local, monkeypatch: pytest.MonkeyPatch, entries: list[tar.Entry], message: str
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.guest.copy.REMEMBERED", 8192)
    monkeypatch.setattr("firebuild_bootstrap.guest.copy.DEEPEST", 20_000)
    stream = b"".join(tar.encode(entry, 0)[0] for entry in entries)
    assert message in local.refused([TREE, piece(stream), END], "/t").message


def test_directories_that_nobody_describes_are_what_mkdir_makes(local: Local) -> None:
    """As in BuildKit: where a default access control list says what others may, that holds."""
    (local.image / "lists").mkdir()
    os.setxattr(local.image / "lists", "system.posix_acl_default", DEFAULT_ACL)
    (local.image / "group").mkdir()
    (local.image / "group").chmod(0o2775)
    stream = [
        TREE,
        piece(
            b"".join(
                (member("", kind=tar.DIRECTORY, mode=0o755), member("d", kind=tar.DIRECTORY, mode=0o755))
            )
        ),
        piece(member("e/f", b"F", mode=0o644)),
        END,
    ]
    umask = os.umask(0o077)
    try:
        for target in ("/lists/a/b", "/group/a/b"):
            local.copy(stream, target)
        local.copy(stream, "/lists/c", chmod="755")
        local.execute(workdir_command("/lists/work"), workdir_command("/plain/work"))
    finally:
        os.umask(umask)
    assert [local.mode(f"lists/{name}") for name in ("a", "a/b", "a/b/e", "work")] == [0o750] * 4
    assert [local.mode(f"lists/{name}") for name in ("a/b/d", "c", "a/b/e/f")] == [0o755, 0o755, 0o644]
    assert [local.mode(f"group/{name}") for name in ("a", "a/b", "a/b/e", "a/b/d")] == [0o2755] * 3 + [0o755]
    assert [local.mode(name) for name in ("plain", "plain/work")] == [0o755] * 2


def test_a_deep_tree_takes_few_descriptors(local: Local) -> None:
    depth = 400
    data = bytearray()
    for level in range(1, depth + 1):
        path = "/".join(["d"] * level)
        data += member(path, kind=tar.DIRECTORY, mode=0o750)
    for level in range(depth, 0, -1):
        data += member("/".join(["d"] * level) + "/f", b"F")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, limits[1]))
    try:
        local.copy([TREE, piece(bytes(data)), END], "/t")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    deepest = Path(local.image, "t", *["d"] * depth)
    assert (deepest / "f").read_text() == "F"
    assert deepest.stat().st_mode & 0o777 == 0o750
