"""Links, odd files and changes during the build: nothing leads out, nothing hangs."""

from __future__ import annotations

import inspect
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from context.finding import HERE, Find, content, error_of, paths, put
from firebuild_bootstrap.context import BuildContext, FileTree
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.legacy.copying import plain
from support import unprivileged


def test_the_secret_beside_the_context_is_out_of_reach(root: Path, find: Find) -> None:
    for source in ("../secret", str(root.parent / "secret"), "/../secret"):
        assert "is not in the build context" in error_of(find, source).message


def test_links_never_lead_out_of_the_context(root: Path, find: Find) -> None:
    (root / "up").symlink_to("../secret")
    (root / "absolute").symlink_to(root.parent / "secret")
    (root / "directory").symlink_to("..")
    for source in ("up", "absolute", "directory/secret", "up*"):
        assert "is not in the build context" in error_of(find, source).message


def test_links_in_a_circle_are_an_error(root: Path, find: Find) -> None:
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    assert "'a' is not in the build context" in error_of(find, "a").message


@pytest.mark.parametrize("source", ["d/a", "d/a/f", "d/*"])
def test_a_link_that_leads_to_nothing_is_called_one(root: Path, find: Find, source: str) -> None:
    (root / "d").mkdir()
    (root / "d/a").symlink_to("/etc")
    hint = "'d/a' is a symbolic link to '/etc', which leads to nothing there"
    assert error_of(find, source).hint == hint


def test_a_link_swapped_in_after_planning_is_not_followed(root: Path, find: Find) -> None:
    put(root, "d/f")
    resource = find("d/f")
    (root / "d/f").unlink()
    (root / "d/f").symlink_to("../../secret")
    with pytest.raises(InputError, match="can't be read"):
        content(resource)


def test_a_directory_swapped_for_a_link_after_planning_is_not_followed(root: Path, find: Find) -> None:
    put(root, "d/secret")
    resource, tree = find("d/secret"), find("d")
    (root / "d").rename(root / "old")
    (root / "d").symlink_to("..")
    with pytest.raises(InputError, match="can't be read"):
        content(resource)
    with pytest.raises(InputError, match="can't be read") as caught:
        list(tree.entries())
    assert caught.value.location == HERE


def test_the_context_itself_may_move_during_the_build(root: Path, find: Find) -> None:
    put(root, "f")
    resource = find("f")
    root.rename(root.parent / "moved")
    assert content(resource) == b"content of f"


def test_a_file_replaced_by_a_fifo_does_not_block_the_build(root: Path, find: Find) -> None:
    put(root, "f")
    resource = find("f")
    (root / "f").unlink()
    os.mkfifo(root / "f")
    with pytest.raises(InputError, match="not a regular file any more"):
        content(resource)


def test_a_file_that_vanishes_is_an_error_that_names_it(root: Path, find: Find) -> None:
    put(root, "d/f")
    resource = find("d")
    entry = list(resource.entries())[1]
    (root / "d/f").unlink()
    assert entry.open is not None
    with pytest.raises(InputError, match=r"'d/f' of the build context can't be read: No such file") as caught:
        entry.open()
    assert caught.value.location == HERE


@pytest.mark.parametrize(
    ("change", "message"), [("more", "it has grown beyond its 100 bytes"), ("les", "it ended 97")]
)
def test_a_file_that_changes_its_size_is_an_error_while_it_is_read(
    root: Path, find: Find, change: str, message: str
) -> None:
    (root / "f").write_text("x" * 100)
    resource = find("f")
    (root / "f").write_text(change * 100 if change == "more" else change)
    with pytest.raises(InputError, match=message) as caught:
        content(resource)
    assert "changed while it was being sent" in caught.value.message
    assert caught.value.location == HERE


def test_an_empty_file_that_grows_is_noticed(root: Path, find: Find) -> None:
    (root / "f").touch()
    assert content(find("f")) == b""
    resource = find("f")
    (root / "f").write_text("now")
    with pytest.raises(InputError, match="has grown"):
        content(resource)


def test_a_large_file_is_read_in_pieces(root: Path, find: Find) -> None:
    with open(root / "big", "wb") as file:
        file.truncate(3 * 1024**3)
    (entry,) = find("big").entries()
    assert entry.size == 3 * 1024**3
    assert entry.open is not None
    with entry.open() as reader:
        assert reader.read(1024) == bytes(1024)


def test_special_files_are_sent_and_never_opened(root: Path, find: Find) -> None:
    os.mkfifo(root / "fifo", 0o622)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    found = {entry.path: entry for entry in find(".").entries()}
    assert (found["fifo"].kind, found["fifo"].open) == (tar.FIFO, None)
    # As in BuildKit.
    assert (found["socket"].kind, found["socket"].size) == (tar.FILE, 0)
    assert found["socket"].open is not None
    assert found["socket"].open().read() == b""
    (alone,) = find("fif*").entries()
    assert (alone.kind, alone.path, alone.from_directory) == (tar.FIFO, "fifo", False)
    try:
        os.mknod(root / "device", 0o20600, os.makedev(1, 3))
    except PermissionError:
        return
    (device,) = find("device").entries()
    assert (device.kind, device.device) == (tar.CHARACTER, (1, 3))


def test_a_guest_that_takes_no_packed_files_gets_no_special_ones(root: Path, find: Find) -> None:
    os.mkfifo(root / "fifo")
    with pytest.raises(InputError, match="'fifo' is a fifo, and the guest is too old"):
        list(plain(find(".").entries()))


def test_names_and_links_that_are_not_utf8_are_errors(root: Path, find: Find) -> None:
    (root / "d").mkdir()
    os.symlink(b"\xff", os.fsencode(root / "d/link"))
    assert "the target of the symbolic link 'd/link' is not UTF-8" in error_of(find, "d").message
    os.unlink(root / "d/link")
    with open(os.fsencode(root / "d") + b"/n\xff", "wb"):
        pass
    assert r"the name of 'd/n\udcff' is not UTF-8" in error_of(find, "d").message
    assert "is not UTF-8" in error_of(find, "d/*").message
    assert error_of(find, "d").hint == "rename it or list it in .dockerignore"


def test_a_name_in_a_stage_is_not_to_be_listed_in_dockerignore(root: Path) -> None:
    with open(os.fsencode(root) + b"/n\xff", "wb"):
        pass
    with FileTree(ContextRoot(root), "the stage 'a'") as tree, pytest.raises(InputError) as caught:
        tree.resource([Files(".")], location=HERE)
    assert caught.value.hint == "rename it"


def test_a_deep_tree_is_no_problem(root: Path, find: Find) -> None:
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert len(paths(find("d"))) == 300
    finally:
        sys.setrecursionlimit(limit)


def test_a_very_deep_tree_is_walked_with_few_descriptors_and_its_files_are_all_read(
    root: Path, find: Find
) -> None:
    depth = 300
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        last = os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=below)  # after d in their order
        os.write(last, b"F")
        os.close(last)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    resource = find("d")
    before = most = len(os.listdir("/proc/self/fd"))
    contents = []
    for entry in resource.entries():
        if entry.open is not None:
            with entry.open() as file:
                contents.append(file.read())
            most = max(most, len(os.listdir("/proc/self/fd")))
    assert contents == [b"F"] * depth
    assert most < before + 140
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_walk_that_is_given_up_leaves_nothing_open_and_its_entries_go_on(root: Path, find: Find) -> None:
    put(root, "d/e/f", "d/g")
    resource = find("d")
    before = len(os.listdir("/proc/self/fd"))
    walk = resource.entries()
    entries = [next(walk) for _ in range(3)]
    walk.close()  # type: ignore[attr-defined]
    assert len(os.listdir("/proc/self/fd")) == before
    assert entries[2].open is not None
    with entries[2].open() as file:
        assert file.read() == b"content of d/e/f"
    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def unreadable(root: Path, name: str) -> Iterator[None]:
    """Keep the user of the block, who is not root, from one file or directory of a tree."""
    os.chmod(root / name, 0)
    for path in (root, *list(root.parents)[:-2]):
        os.chmod(path, 0o755)
    with unprivileged():
        yield
    os.chmod(root / name, 0o700)


@pytest.mark.parametrize("locked", ["d/private", "d"])
def test_what_the_user_may_not_read_is_an_error_before_anything_starts(
    root: Path, find: Find, locked: str
) -> None:
    put(root, "d/private")
    with unreadable(root, locked):
        for source in ("d", "d/private", "d/*", "*/private"):
            assert "Permission denied" in str(error_of(find, source))


def test_what_is_excluded_need_not_be_readable_where_a_wildcard_looks_for_more(
    root: Path, find: Find
) -> None:
    put(root, "d/f", "private/f")
    (root / ".dockerignore").write_text("private\n")
    with unreadable(root, "private"):
        for source in ("*", "*/f"):
            assert [entry.source for entry in find(source).entries() if entry.source.endswith("/f")] == [
                "d/f"
            ]


def test_no_descriptor_is_left_open(root: Path) -> None:
    put(root, "d/e/f", "d/g")
    (root / "l").symlink_to("d/e")
    before = len(os.listdir("/proc/self/fd"))
    with BuildContext(root) as context:
        for entry in context.resource([Files("d"), Files("l/f"), Files("*/g")]).entries():
            if entry.open is not None:
                with entry.open() as file:
                    file.read()
        with pytest.raises(InputError):
            context.resource([Files("d/e/f/g/h")])
        assert len(os.listdir("/proc/self/fd")) == before + 1
    context.close()
    assert len(os.listdir("/proc/self/fd")) == before
