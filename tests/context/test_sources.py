"""How the sources of COPY are found, and what of them is sent."""

from __future__ import annotations

import inspect
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.context import BuildContext, ContextResource, EntryKind, InlineSource, LocalSource
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.errors import InputError, Location

Find = Callable[..., ContextResource]
HERE = Location("Dockerfile", 5)


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def paths(resource: ContextResource) -> list[str]:
    return [entry.path for entry in resource.entries()]


def content(resource: ContextResource) -> bytes:
    (entry,) = resource.entries()
    assert entry.open is not None
    with entry.open() as file:
        return file.read()


def error_of(find: Find, *sources: str) -> InputError:
    with pytest.raises(InputError) as caught:
        find(*sources)
    assert caught.value.location == HERE
    return caught.value


# --- files and directories --------------------------------------------------------------------------


def test_a_file_is_one_entry_with_its_name_mode_and_time(root: Path, find: Find) -> None:
    put(root, "bin/tool")
    os.chmod(root / "bin/tool", 0o4751)
    os.utime(root / "bin/tool", ns=(0, 1_234_567_890_123_456_789))
    (entry,) = find("bin/tool").entries()
    assert (entry.source, entry.path, entry.kind, entry.from_directory) == (
        "bin/tool",
        "tool",
        EntryKind.FILE,
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
    os.chmod(root / "src", 0o2750)
    entries = list(find("src").entries())
    assert [(entry.path, entry.kind) for entry in entries] == [
        ("", EntryKind.DIRECTORY),
        (".hidden", EntryKind.FILE),
        ("a", EntryKind.DIRECTORY),
        ("a/deep", EntryKind.DIRECTORY),
        ("a/deep/file", EntryKind.FILE),
        ("a.txt", EntryKind.FILE),
        ("b", EntryKind.FILE),
        ("empty", EntryKind.DIRECTORY),
    ]
    assert all(entry.from_directory for entry in entries)
    assert entries[0].mode == 0o2750


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


def test_the_secret_beside_the_context_is_out_of_reach(root: Path, find: Find) -> None:
    for source in ("../secret", str(root.parent / "secret"), "/../secret"):
        assert "is not in the build context" in error_of(find, source).message


def test_links_inside_a_tree_are_sent_as_links(root: Path, find: Find) -> None:
    put(root, "src/real/file")
    (root / "src/to-file").symlink_to("real/file")
    (root / "src/to-directory").symlink_to("real")
    (root / "src/outside").symlink_to("/etc/passwd")
    (root / "src/dangling").symlink_to("nothing")
    links = {
        entry.path: entry.link_target for entry in find("src").entries() if entry.kind is EntryKind.SYMLINK
    }
    assert links == {
        "to-file": "real/file",
        "to-directory": "real",
        "outside": "/etc/passwd",
        "dangling": "nothing",
    }
    assert not any(entry.open for entry in find("src").entries() if entry.kind is EntryKind.SYMLINK)


def test_a_source_that_is_a_link_is_followed_and_keeps_its_own_name(root: Path, find: Find) -> None:
    put(root, "real/file")
    (root / "link").symlink_to("real/file")
    (root / "directory").symlink_to("./real/../real")
    (root / "absolute").symlink_to("/real")
    (entry,) = find("link").entries()
    assert (entry.kind, entry.path, entry.source) == (EntryKind.FILE, "link", "link")
    assert content(find("link")) == b"content of real/file"
    assert paths(find("directory")) == ["", "file"]
    assert content(find("directory/file")) == b"content of real/file"
    assert content(find("absolute/file")) == b"content of real/file"


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
    with pytest.raises(InputError, match="no regular file any more"):
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


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_what_is_no_file_is_an_error_that_names_it_before_anything_starts(
    root: Path, find: Find, kind: str
) -> None:
    (root / "d").mkdir()
    if kind == "FIFO":
        os.mkfifo(root / "d/odd")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(root / "d/odd"))
    else:
        try:
            os.mknod(root / "d/odd", 0o20600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("needs root")
    for source in ("d", "d/odd", "d/o*", "."):
        error = error_of(find, source)
        assert f"'d/odd' is a {kind}" in error.message
        assert ".dockerignore" in str(error.hint)
    (root / ".dockerignore").write_text("d/odd")
    assert paths(find("d")) == [""]


def test_names_and_links_that_are_not_utf8_are_errors(root: Path, find: Find) -> None:
    (root / "d").mkdir()
    os.symlink(b"\xff", os.fsencode(root / "d/link"))
    assert "the target of the symbolic link 'd/link' is not UTF-8" in error_of(find, "d").message
    os.unlink(root / "d/link")
    with open(os.fsencode(root / "d") + b"/n\xff", "wb"):
        pass
    assert r"the name of 'd/n\udcff' is not UTF-8" in error_of(find, "d").message
    assert "is not UTF-8" in error_of(find, "d/*").message


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


@pytest.mark.parametrize("locked", ["d/private", "d"])
def test_what_the_user_may_not_read_is_an_error_before_anything_starts(
    root: Path, find: Find, locked: str
) -> None:
    put(root, "d/private")
    os.chmod(root / locked, 0)
    for path in (root, *list(root.parents)[:-2]):
        os.chmod(path, 0o755)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        for source in ("d", "d/private"):
            assert "Permission denied" in str(error_of(find, source))
    finally:
        if is_root:
            os.seteuid(0)
        os.chmod(root / locked, 0o700)


# --- missing sources --------------------------------------------------------------------------------


def test_a_missing_file_hints_at_the_nearest_names_in_its_directory(root: Path, find: Find) -> None:
    put(root, "src/main.py", "src/other.py")
    error = error_of(find, "src/mian.py")
    assert error.message == f"'src/mian.py' is not in the build context {root}"
    assert error.hint == "in 'src' there is: main.py"
    assert error_of(find, "scr/main.py").hint == "in '.' there is: src"
    assert error_of(find, "src/zzz").hint == "in 'src' there is: main.py, other.py"
    assert error_of(find, "src/main.py/x").hint == "in 'src' there is: main.py"


def test_a_missing_file_of_an_empty_context_says_so(find: Find) -> None:
    assert error_of(find, "a").hint == "in '.' there is: nothing"


def test_an_empty_source_does_not_mean_the_whole_context(root: Path, find: Find) -> None:
    put(root, "f")
    assert "a source is empty" in error_of(find, "").message


def test_a_context_that_is_no_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for name in ("f", "nothing"):
        with pytest.raises(InputError, match="expected a directory"):
            BuildContext(tmp_path / name)


# --- wildcards --------------------------------------------------------------------------------------


def test_wildcards_match_names_in_order(root: Path, find: Find) -> None:
    put(root, "a1", "a2", "b1", "x/a3", ".a4")
    assert paths(find("a*")) == ["a1", "a2"]
    assert paths(find("?1")) == ["a1", "b1"]
    assert paths(find("*/a[0-9]")) == ["a3"]
    assert paths(find("x/*")) == ["a3"]
    assert paths(find("../[a-b]1")) == ["a1", "b1"]


def test_a_wildcard_may_match_directories_whose_contents_are_sent(root: Path, find: Find) -> None:
    put(root, "one/f", "two/g", "three")
    assert paths(find("t*")) == ["three", "", "g"]


def test_a_wildcard_in_the_middle_needs_directories(root: Path, find: Find) -> None:
    put(root, "a/f", "b/sub/f", "c")
    (root / "l").symlink_to("a")
    assert [entry.source for entry in find("*/f").entries()] == ["a/f"]
    assert [entry.source for entry in find("*/*/f").entries()] == ["b/sub/f"]


def test_links_that_match_are_followed(root: Path, find: Find) -> None:
    put(root, "a/f")
    (root / "link").symlink_to("a/f")
    (entry,) = find("l*").entries()
    assert (entry.kind, entry.path) == (EntryKind.FILE, "link")


def test_special_characters_can_be_escaped(root: Path, find: Find) -> None:
    put(root, "a*", "ab", "c[0]", "back\\slash")
    assert paths(find("a\\*")) == ["a*"]
    assert paths(find("c[[]0]")) == ["c[0]"]
    assert paths(find("back\\slash")) == ["back\\slash"]


def test_a_pattern_that_matches_nothing_is_fine_beside_a_source_that_exists(root: Path, find: Find) -> None:
    put(root, "package.json")
    assert paths(find("package.json", "package-lock.json*", "nowhere/*")) == ["package.json"]


@pytest.mark.parametrize("pattern", ["*.none", "nowhere/*", "f/*", "*/*/*"])
def test_patterns_that_match_nothing_at_all_are_an_error(root: Path, find: Find, pattern: str) -> None:
    put(root, "f", "d/g")
    assert error_of(find, pattern).message == f"nothing in the build context matches {pattern!r}"


def test_a_malformed_pattern_is_an_error(find: Find) -> None:
    assert error_of(find, "a[").message == "the pattern 'a[' is malformed: a [ is never closed"


# --- .dockerignore ----------------------------------------------------------------------------------


def test_ignored_files_do_not_exist(root: Path, find: Find) -> None:
    put(root, "keep", "drop", "d/keep", "d/drop.log", "e/x", "node_modules/p/q")
    (root / ".dockerignore").write_text(
        "\ufeff# comment\n\ndrop\n**/*.log\ne\n/node_modules/\n.dockerignore\n"
    )
    assert paths(find(".")) == ["", "d", "d/keep", "keep"]
    assert paths(find("*")) == ["", "keep", "keep"]
    error = error_of(find, "drop")
    assert error.hint == f"{root}/.dockerignore excludes it"
    assert error_of(find, "e/x").hint == f"{root}/.dockerignore excludes it"
    assert error_of(find, "e").message.startswith("'e' is not in")
    assert error_of(find, "keeep").hint == "in '.' there is: keep"


def test_the_last_match_wins_and_parents_of_kept_files_are_kept(root: Path, find: Find) -> None:
    put(root, "a/b/keep", "a/b/drop", "a/c/drop", "z")
    (root / ".dockerignore").write_text("*\n!a/b/keep\n")
    assert paths(find(".")) == ["", "a", "a/b", "a/b/keep"]
    assert paths(find("a/b")) == ["", "keep"]
    assert paths(find("*/b")) == ["", "keep"]
    assert "is not in" in error_of(find, "a/c").message
    assert "matches" in error_of(find, "z*").message


def test_rules_apply_to_what_a_link_leads_to_and_to_the_link(root: Path, find: Find) -> None:
    put(root, "secret/key", "open/f")
    (root / "to-key").symlink_to("secret/key")
    (root / "to-open").symlink_to("open/f")
    (root / ".dockerignore").write_text("secret\nto-open\n")
    assert "is not in" in error_of(find, "to-key").message
    assert "is not in" in error_of(find, "to-open").message
    assert "is not in" in error_of(find, "to-k*").message


def test_the_ignore_file_of_the_dockerfile_wins(root: Path) -> None:
    put(root, "a", "b", "docker/Dockerfile.dev")
    (root / ".dockerignore").write_text("a")
    (root / "docker/Dockerfile.dev.dockerignore").write_text("b\ndocker\n.dockerignore")
    with BuildContext(root, root / "docker/Dockerfile.dev") as context:
        assert paths(context.resource([LocalSource(".")])) == ["", "a"]
    with BuildContext(root, root / "docker/Dockerfile") as context:
        assert "b" in paths(context.resource([LocalSource(".")]))


def test_a_malformed_rule_is_an_error_at_its_line(root: Path) -> None:
    (root / ".dockerignore").write_text("fine\n[[a]\n!\n")
    with pytest.raises(InputError, match="illegal exclusion pattern") as caught:
        BuildContext(root)
    assert caught.value.location == Location(str(root / ".dockerignore"), 3)


def test_an_unreadable_ignore_file_is_an_error(root: Path) -> None:
    (root / ".dockerignore").write_bytes(b"\xff")
    with pytest.raises(InputError, match="ignore file can't be read"):
        BuildContext(root)
    (root / ".dockerignore").unlink()
    (root / ".dockerignore").mkdir()
    with pytest.raises(InputError, match="ignore file can't be read"):
        BuildContext(root)


_NAMES = st.sampled_from(["a", "b", "c"])
_FILES = st.lists(st.lists(_NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6)
_RULES = st.lists(st.sampled_from(["a", "b/a", "!a", "!*/b", "*", "**/c", "!a/b/c", "a/*", "!b"]), max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=_FILES, rules=_RULES)
def test_exactly_what_is_not_ignored_is_sent(
    tmp_path_factory: pytest.TempPathFactory, files: list[str], rules: list[str]
) -> None:
    root = tmp_path_factory.mktemp("context")
    for name in files:
        path = root / name
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    ignore = root.parent / f"{root.name}.dockerignore"
    ignore.write_text("\n".join(rules))
    with BuildContext(root, root.parent / root.name) as context:
        from e2b_dockerfile_utils import PatternMatcher

        matcher = PatternMatcher(rules)
        kept = {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and not matcher.matches(str(path.relative_to(root)))
        }
        entries = list(context.resource([LocalSource(".")]).entries())
    assert {entry.path for entry in entries if entry.kind is EntryKind.FILE} == kept
    seen = {""}
    for entry in entries[1:]:
        assert entry.path.rpartition("/")[0] in seen
        seen.add(entry.path)


# --- heredocs and lifetime --------------------------------------------------------------------------


def test_a_heredoc_is_a_file_of_the_time_of_planning(root: Path) -> None:
    with BuildContext(root, clock_ns=lambda: 77) as context:
        (entry,) = context.resource([InlineSource("motd", "héllo\n")]).entries()
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


def test_no_descriptor_is_left_open(root: Path) -> None:
    put(root, "d/e/f", "d/g")
    (root / "l").symlink_to("d/e")
    before = len(os.listdir("/proc/self/fd"))
    with BuildContext(root) as context:
        for entry in context.resource([LocalSource("d"), LocalSource("l/f"), LocalSource("*/g")]).entries():
            if entry.open is not None:
                with entry.open() as file:
                    file.read()
        with pytest.raises(InputError):
            context.resource([LocalSource("d/e/f/g/h")])
        assert len(os.listdir("/proc/self/fd")) == before + 1
    context.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_root_of_the_context_knows_itself(root: Path) -> None:
    directory = ContextRoot(root)
    assert (directory.node(()).path, directory.path) == ("", root)
    directory.close()
