"""How the sources of COPY are found, and what of them is sent."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from context.finding import Find, content, paths, put
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.dockerfile.graph import Heredoc
from firebuild_bootstrap.layers import tar


def test_a_file_is_one_entry_with_its_name_mode_and_time(root: Path, find: Find) -> None:
    put(root, "bin/tool")
    os.chmod(root / "bin/tool", 0o4751)
    os.utime(root / "bin/tool", ns=(0, 1_234_567_890_123_456_789))
    (entry,) = find("bin/tool").entries()
    assert (entry.source, entry.path, entry.kind, entry.from_directory) == (
        "bin/tool",
        "tool",
        tar.FILE,
        False,
    )
    assert (entry.mode, entry.mtime_ns, entry.size, entry.owner) == (
        0o4751,
        1_234_567_890_123_456_789,
        19,
        None,
    )
    assert content(find("bin/tool")) == b"content of bin/tool"


def test_a_directory_means_its_contents_sorted_with_parents_first(root: Path, find: Find) -> None:
    put(root, "src/b", "src/a/deep/file", "src/a.txt", "src/.hidden")
    (root / "src/empty").mkdir()
    os.chmod(root / "src/a", 0o2750)
    entries = list(find("src").entries())
    assert [(entry.path, entry.kind) for entry in entries] == [
        ("", tar.DIRECTORY),
        (".hidden", tar.FILE),
        ("a", tar.DIRECTORY),
        ("a/deep", tar.DIRECTORY),
        ("a/deep/file", tar.FILE),
        ("a.txt", tar.FILE),
        ("b", tar.FILE),
        ("empty", tar.DIRECTORY),
    ]
    assert all(entry.from_directory for entry in entries)
    assert entries[2].mode == 0o2750


def test_the_mode_of_the_source_itself_is_not_that_of_its_copy(root: Path, find: Find) -> None:
    put(root, "src/f")
    for directory in (root, root / "src"):
        directory.chmod(0o700)
    for source, last in ((".", "src/f"), ("src", "f"), ("s*", "f")):
        entries = list(find(source).entries())
        assert (entries[0].path, entries[0].mode, entries[-1].path) == ("", 0o755, last)


@pytest.mark.parametrize("source", [".", "/", "./", "src/..", "../..", "/src/../"])
def test_the_whole_context_has_several_names(root: Path, find: Find, source: str) -> None:
    put(root, "src/a")
    assert paths(find(source)) == ["", "src", "src/a"]


@pytest.mark.parametrize(
    "source", ["../f", "/f", "./f", "//f", "../../../f", "d/../f", "/../f", "nowhere/../f"]
)
def test_dots_and_slashes_never_leave_the_context(root: Path, find: Find, source: str) -> None:
    put(root, "f", "d/x")
    assert content(find(source)) == b"content of f"


def test_links_inside_a_tree_are_sent_as_links(root: Path, find: Find) -> None:
    put(root, "src/real/file")
    (root / "src/to-file").symlink_to("real/file")
    (root / "src/to-directory").symlink_to("real")
    (root / "src/outside").symlink_to("/etc/passwd")
    (root / "src/dangling").symlink_to("nothing")
    links = {entry.path: entry.link_target for entry in find("src").entries() if entry.kind == tar.SYMLINK}
    assert links == {
        "to-file": "real/file",
        "to-directory": "real",
        "outside": "/etc/passwd",
        "dangling": "nothing",
    }
    assert not any(entry.open for entry in find("src").entries() if entry.kind == tar.SYMLINK)


def test_names_of_one_file_are_hard_links_to_the_first_that_is_visible(root: Path, find: Find) -> None:
    put(root, "d/b", "d/other", "d/x/.keep")
    for name in ("a", "c", "x/again"):
        os.link(root / "d/b", root / "d" / name)
    (root / ".dockerignore").write_text("d/a")
    found = {entry.path: entry for entry in find("d").entries()}
    links = {path: entry.link_target for path, entry in found.items() if entry.kind == tar.HARDLINK}
    assert links == {"c": "b", "x/again": "b"}
    assert found["b"].kind == tar.FILE
    assert all(entry.open is None for entry in found.values() if entry.path in links)
    assert next(find("d/c").entries()).kind == tar.FILE


def test_a_source_that_is_a_link_is_followed_and_keeps_its_own_name(root: Path, find: Find) -> None:
    put(root, "real/file")
    (root / "link").symlink_to("real/file")
    (root / "directory").symlink_to("./real/../real")
    (root / "absolute").symlink_to("/real")
    (entry,) = find("link").entries()
    assert (entry.kind, entry.path, entry.source) == (tar.FILE, "link", "link")
    assert content(find("link")) == b"content of real/file"
    assert paths(find("directory")) == ["", "file"]
    assert content(find("directory/file")) == b"content of real/file"
    assert content(find("absolute/file")) == b"content of real/file"


def test_a_heredoc_is_a_file_of_the_time_of_planning(root: Path) -> None:
    with BuildContext(root, clock_ns=lambda: 77) as context:
        (entry,) = context.resource([Heredoc("motd", "héllo\n")]).entries()
    assert (entry.source, entry.path, entry.mode, entry.mtime_ns, entry.size) == (
        "motd",
        "motd",
        0o644,
        77,
        7,
    )
    assert entry.open is not None
    assert entry.open().read() == "héllo\n".encode()


def test_a_resource_can_be_sent_again_and_from_several_threads(root: Path, find: Find) -> None:
    put(root, *(f"d/{number}" for number in range(50)))
    resource = find("d")
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(paths(resource))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(len(result) == 51 for result in results)


def test_the_root_of_the_context_knows_itself(root: Path) -> None:
    directory = ContextRoot(root)
    assert (directory.node(()).path, directory.path) == ("", root)
    directory.close()


def test_a_reader_may_be_closed_twice(root: Path, find: Find) -> None:
    put(root, "f")
    (entry,) = find("f").entries()
    assert entry.open is not None
    reader = entry.open()
    reader.close()
    reader.close()
    assert reader.closed


def test_a_time_that_the_protocol_can_not_hold_becomes_the_nearest_one(root: Path, find: Find) -> None:
    (root / "far").write_text("x")
    os.utime(root / "far", (15_022_195_200, 15_022_195_200))
    assert (root / "far").stat().st_mtime == 15_022_195_200
    (entry,) = find("far").entries()
    assert entry.mtime_ns == 2**63 - 1
