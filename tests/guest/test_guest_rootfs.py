"""The safe file operations, modes and users of an image."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import pytest

from firebuild_bootstrap.guest.errors import StepError
from firebuild_bootstrap.guest.users import Identity, Users, check_mapped, mapped, parse_mode
from firebuild_bootstrap.layers.root import Metadata, Root

ME = (os.geteuid(), os.getegid())
MINE = Metadata(ME, 0o644)


def where(root: Root, path: str, *, follow: bool = True) -> str:
    with root.locate(path, follow=follow) as place:
        return place.path


@pytest.fixture
def tree(root: Root) -> Path:
    path = Path(root.path)
    (path / "a/b").mkdir(parents=True)
    (path / "a/f").write_text("F")
    (path / "abs").symlink_to("/a/b")
    (path / "a/rel").symlink_to("../abs/..")
    (path / "up").symlink_to("../../../../../a")
    (path / "dangling").symlink_to("/x/y")
    return path


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        ("/", "/"),
        ("", "/"),
        ("..", "/"),
        ("/../..//./a/f", "/a/f"),
        ("abs", "/a/b"),
        ("abs/..", "/a"),
        ("a/rel/f", "/a/f"),
        ("up/f", "/a/f"),
        ("a/new", "/a/new"),
        ("a/f/../../x", None),
        ("a/b/..", "/a"),
    ],
)
def test_paths_are_resolved_inside_the_root(root: Root, tree: Path, path: str, resolved: str | None) -> None:
    if resolved is None:
        with pytest.raises(NotADirectoryError):
            where(root, path)
    else:
        assert where(root, path) == resolved


def test_the_last_link_is_followed_or_not(root: Root, tree: Path) -> None:
    assert where(root, "up", follow=False) == "/up"
    with pytest.raises(FileNotFoundError):
        where(root, "dangling")
    assert root.status("dangling") is None
    assert root.status("dangling", follow=False) is not None
    assert root.status("a/f/x") is None


def test_missing_parents_are_made_where_a_link_leads(root: Root, tree: Path) -> None:
    created: list[str] = []
    with root.locate("dangling", parents=ME, created=created) as place:
        assert (place.path, place.status()) == ("/x/y", None)
    assert created == ["/x"]


def test_a_directory_that_somebody_else_makes_meanwhile_is_fine(root: Root) -> None:
    def make() -> None:
        for number in range(300):
            assert isinstance(root.make_directory(f"d{number}/e/f", MINE, parents=ME), bool)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(Path(root.path).glob("*/e/f"))) == 300


def test_only_regular_files_up_to_a_limit_are_read(root: Root, tree: Path) -> None:
    os.mkfifo(tree / "fifo")
    assert root.read("up/f", 1) == b"F"
    for path, limit, words in (("a/f", 0, "longer than 0"), ("fifo", 9, "regular"), ("a", 9, "regular")):
        with pytest.raises(OSError, match=words):
            root.read(path, limit)


def test_only_what_is_empty_is_removed(root: Root, tree: Path) -> None:
    (tree / "empty").write_text("")
    (tree / "void").mkdir()
    for path in ("empty", "void", "a", "a/f", "dangling", "missing", "a/f/x", "missing/x"):
        root.remove_if_empty(path)
    assert {entry.name for entry in tree.iterdir()} == {"a", "abs", "up", "dangling"}
    assert (tree / "a/f").exists()


def test_no_descriptor_is_left_open(root: Root, tree: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a/rel/f", "abs/x/y", "a/f/x", "missing/x", "dangling", "/"):
        root.status(path)
        root.is_directory(path)
    with pytest.raises(IsADirectoryError):
        root.write("a", [b""], MINE)
    root.write("a/f", [b"x"] * 3, MINE)
    root.hardlink("a/g", "a/f")
    root.hardlink("a/g", "a/f")
    root.symlink("a/s", "f", MINE)
    assert len(os.listdir("/proc/self/fd")) == before
    assert sorted(entry.name for entry in (tree / "a").iterdir()) == ["b", "f", "g", "rel", "s"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(root: Root, tree: Path) -> None:
    def broken() -> object:
        yield b"half"
        raise StepError("broken")

    with pytest.raises(StepError):
        root.write("a/f", broken(), MINE)  # type: ignore[arg-type]
    assert (tree / "a/f").read_text() == "F"
    assert len(list((tree / "a").iterdir())) == 3


def test_nothing_outside_is_touched_while_directories_turn_into_links(root: Root, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("precious")
    mode = outside.stat().st_mode
    base = Path(root.path)
    (base / "d").mkdir()
    (base / "evil").symlink_to(outside)
    done = threading.Event()
    swaps: list[bool] = []

    def swap() -> None:
        while not done.is_set():
            swaps.append(_exchange(base / "d", base / "evil"))

    thread = threading.Thread(target=swap)
    thread.start()
    refused = 0
    for _ in range(500):
        for action in (
            lambda: root.write("d/f", [b"x"], MINE),
            lambda: root.make_directory("d/sub/x", Metadata(ME, 0o777), parents=ME),
            lambda: root.set_directory("d", Metadata(ME, 0o711)),
            lambda: root.symlink("d/l", "x", MINE),
        ):
            try:
                action()
            except OSError:
                refused += 1
    done.set()
    thread.join()
    assert [entry.name for entry in outside.iterdir()] == ["f"]
    assert ((outside / "f").read_text(), outside.stat().st_mode) == ("precious", mode)
    assert refused < 2000
    assert swaps.count(True) > 500


def _exchange(one: Path, other: Path) -> bool:
    at_cwd, rename_exchange = -100, 2  # renameat2(2)
    libc = ctypes.CDLL(None)
    return bool(libc.renameat2(at_cwd, bytes(one), at_cwd, bytes(other), rename_exchange) == 0)


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "old", "directory", "new"),
    [
        ("755", 0o600, False, 0o755),
        ("0644", 0o777, True, 0o644),
        ("4755", 0, False, 0o4755),
        ("u=rwX,go=rX", 0o600, False, 0o644),
        ("u=rwX,go=rX", 0o700, False, 0o755),
        ("u=rwX,go=rX", 0o000, True, 0o755),
        ("+x", 0o644, False, 0o755),
        ("+w", 0o444, False, 0o666),
        ("a+w", 0o444, False, 0o666),
        ("go-rwx", 0o777, False, 0o700),
        ("g=u", 0o640, False, 0o660),
        ("o=", 0o777, False, 0o770),
        ("=", 0o7777, False, 0o1000),
        ("u+s,g+s,+t", 0o755, False, 0o7755),
        ("u-s", 0o4755, False, 0o755),
        ("u=rw", 0o4755, False, 0o655),
        ("u=rwx", 0o4700, True, 0o700),
        ("o=x", 0o1777, False, 0o1771),
        ("u+r-w", 0o200, False, 0o400),
        ("a-x+X", 0o755, False, 0o755),
        ("a-x+X", 0o644, False, 0o644),
        ("a-x+X", 0o755, True, 0o755),
    ],
)
def test_modes_are_changed_as_buildkit_does(text: str, old: int, directory: bool, new: int) -> None:
    assert oct(parse_mode(text)(old, directory)) == oct(new)


@pytest.mark.parametrize("text", ["", "8", "77777", "u", "rwx", "u=rwx,", "u+rug", "-", "0x1", "u=rw g=r"])
def test_what_is_no_mode_is_refused(text: str) -> None:
    if text == "-":  # removes nothing, as chmod(1) has it
        assert parse_mode(text)(0o755, False) == 0o755
        return
    with pytest.raises(ValueError, match="expected a mode"):
        parse_mode(text)


# --- users ----------------------------------------------------------------------------------------

PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:\n# a comment\nhalf:x:5\nodd:x:x:5::\n"
PASSWD += "77:x:9:9:::\n"
GROUP = "root:x:0:\nwheel:x:10:root,app\napp:x:1001:app\nstaff:x:50:other,app\nbad:x:y:app\n10:x:99:\n"


@pytest.fixture
def users(root: Root) -> Users:
    etc = Path(root.path) / "etc"
    etc.mkdir()
    (etc / "passwd").write_text(PASSWD)
    (etc / "group").write_text(GROUP)
    return Users(root)


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("", Identity(0, 0, (0, 10), "/root")),
        ("0", Identity(0, 0, (0, 10), "/root")),
        ("root", Identity(0, 0, (0, 10), "/root")),
        ("app", Identity(1000, 1001, (1001, 10, 50), "/home/app")),
        ("1000", Identity(1000, 1001, (1001, 10, 50), "/home/app")),
        ("app:staff", Identity(1000, 50, (50,), "/home/app")),
        ("app:", Identity(1000, 1001, (1001, 10, 50), "/home/app")),
        ("app:4", Identity(1000, 4, (4,), "/home/app")),
        ("4242", Identity(4242, 0, (0,), "/")),
        ("77", Identity(77, 0, (0,), "/")),  # a number is an id, also where it is a name
        ("9", Identity(9, 9, (9,), "/")),
        ("app:10", Identity(1000, 10, (10,), "/home/app")),
        ("00001000", Identity(1000, 1001, (1001, 10, 50), "/home/app")),
        (":staff", Identity(0, 50, (50,), "/root")),
    ],
)
def test_user_is_resolved_in_the_images_own_files(users: Users, text: str, identity: Identity) -> None:
    assert users.identity(text) == identity


def test_without_the_files_numbers_work_and_names_but_root_do_not(root: Root) -> None:
    users = Users(root)
    assert (
        users.identity("")
        == users.identity("0:0")
        == users.identity("root:root")
        == Identity(0, 0, (0,), "/")
    )
    assert users.identity(":5") == Identity(0, 5, (5,), "/")
    assert users.owner("root") == users.owner("root:root") == (0, 0)
    assert users.identity("5:6") == Identity(5, 6, (6,), "/")
    with pytest.raises(StepError, match="/etc/passwd of the image does not exist"):
        users.identity("app")
    with pytest.raises(StepError, match="/etc/group of the image does not exist"):
        users.owner("0:staff")


@pytest.mark.parametrize("text", ["nobody-here", "odd", "half", "app:none", "4294967295", "-1", "٣"])
def test_unknown_users_and_impossible_numbers_are_errors(users: Users, text: str) -> None:
    with pytest.raises(StepError, match=f"USER {text}"):
        users.identity(text)


def test_files_that_cannot_be_read_are_an_error_with_their_name(root: Root) -> None:
    (Path(root.path) / "etc/passwd").mkdir(parents=True)
    with pytest.raises(StepError, match="/etc/passwd of the image can't be read"):
        Users(root).identity("app")


def test_the_files_are_looked_up_inside_the_image_only(root: Root) -> None:
    (Path(root.path) / "etc").symlink_to("/etc")
    with pytest.raises(StepError):
        Users(root).identity("nobody")


# --- ids ------------------------------------------------------------------------------------------


def test_ids_are_looked_up_in_the_kernels_maps(tmp_path: Path) -> None:
    lines = ["         0       1000          1\n", "         1     100000      65536\n"]
    assert [mapped(number, lines) for number in (0, 1, 65536, 65537)] == [True, True, True, False]
    one = tmp_path / "map"
    one.write_text(lines[0])
    check_mapped("USER root", 0, 0, (10,), uid_map=str(one), gid_map=str(one))
    for uid, gid, word in ((5, 0, "uid 5"), (0, 6, "gid 6")):
        with pytest.raises(StepError, match=f"USER x: {word} does not exist.*subuid"):
            check_mapped("USER x", uid, gid, uid_map=str(one), gid_map=str(one))
    every = tmp_path / "every"
    every.write_text("0 0 4294967295")
    with pytest.raises(StepError, match="gid 10"):
        check_mapped("USER app", 5, 0, (10,), uid_map=str(every), gid_map=str(one))
