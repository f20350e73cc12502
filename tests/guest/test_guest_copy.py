"""COPY and ADD: where files go, what they look like there, and what is refused."""

from __future__ import annotations

import os

import pytest

from firebuild_bootstrap import wire
from guest.build import workdir_command
from guest.local import Local
from guest.server import Item, a_directory, a_file, a_link, in_tree

pytestmark = pytest.mark.root


TREE = [*a_directory(""), *in_tree("a", b"A"), *a_directory("sub"), *in_tree("sub/b", b"B")]


# --- where it goes --------------------------------------------------------------------------------


def test_a_name_without_slash_renames_the_file(local: Local) -> None:
    local.copy(a_file("a.txt", b"A"), "/b.txt")
    assert local.tree() == {"b.txt": "A"}


def test_a_trailing_slash_means_into_even_if_nothing_is_there(local: Local) -> None:
    local.copy(a_file("a.txt", b"A"), "/new/dir/")
    assert local.tree() == {"new": "dir", "new/dir": "dir", "new/dir/a.txt": "A"}


def test_a_target_said_to_be_a_directory_is_one(local: Local) -> None:
    local.copy(a_file("a.txt", b"A"), "/new", target_is_directory=True)
    assert local.tree() == {"new": "dir", "new/a.txt": "A"}


def test_a_file_goes_into_an_existing_directory(local: Local) -> None:
    (local.image / "old").mkdir()
    local.copy(a_file("a.txt", b"A"), "/old")
    assert local.tree() == {"old": "dir", "old/a.txt": "A"}


def test_several_files_go_into_the_directory(local: Local) -> None:
    local.copy([*a_file("a", b"A"), *a_file("x/b", b"B")], "/d/")
    assert local.tree() == {"d": "dir", "d/a": "A", "d/b": "B"}


def test_relative_targets_are_below_the_workdir_and_absolute_ones_are_not(local: Local) -> None:
    local.copy(a_file("a", b"A"), "b", workdir="/w")
    local.copy(a_file("a", b"A"), "/c", workdir="/w")
    local.copy(a_file("a", b"A"), ".", workdir="/w")
    local.copy(a_file("a", b"A"), "../../../up", workdir="/w")
    assert local.tree() == {"w": "dir", "w/b": "A", "c": "A", "w/a": "A", "up": "A"}


@pytest.mark.parametrize(
    ("target", "fields", "where"),
    [
        ("/a/../g", {}, "g"),
        ("/a/../g/", {}, "g/f"),
        ("../g", {"workdir": "/a"}, "g"),
        ("..", {"workdir": "/a/b"}, "x/y/f"),
        ("/a/..", {}, "f"),
        ("g", {"workdir": "/a/../w"}, "w/g"),
        ("/a/./g", {}, "x/y/g"),
    ],
)
def test_a_destination_is_cleaned_before_links_are_followed(
    local: Local, target: str, fields: dict[str, str], where: str
) -> None:
    (local.image / "x/y").mkdir(parents=True)
    (local.image / "a").symlink_to("x/y")
    local.copy(a_file("f", b"F"), target, **fields)
    assert local.tree().get(where) == "F"


def test_a_workdir_is_cleaned_before_links_are_followed(local: Local) -> None:
    (local.image / "x/y").mkdir(parents=True)
    (local.image / "a").symlink_to("x/y")
    local.execute(workdir_command("/a/../w"))
    assert set(local.tree()) == {"a", "w", "x", "x/y"}


def test_a_directory_means_its_contents_merged_into_what_is_there(local: Local) -> None:
    (local.image / "t/sub").mkdir(parents=True)
    (local.image / "t/sub/kept").write_text("K")
    (local.image / "t/a").write_text("old and much longer")
    local.copy(TREE, "/t")
    assert local.tree() == {"t": "dir", "t/a": "A", "t/sub": "dir", "t/sub/b": "B", "t/sub/kept": "K"}


def test_links_are_copied_as_links_and_hard_links_share_their_file(local: Local) -> None:
    chunks = [*TREE, *a_link("soft", "../nowhere"), *a_link("sub/hard", "a", hard=True)]
    local.copy(chunks, "/t/")
    assert local.tree()["t/soft"] == "-> ../nowhere"
    assert os.path.samefile(local.image / "t/a", local.image / "t/sub/hard")


def test_a_link_replaces_a_file_and_a_file_in_a_tree_replaces_a_link(local: Local) -> None:
    (local.image / "t").mkdir()
    (local.image / "t/soft").write_text("was a file")
    (local.image / "elsewhere").write_text("E")
    (local.image / "t/a").symlink_to("../elsewhere")
    local.copy([*TREE, *a_link("soft", "a")], "/t")
    assert local.tree()["t/soft"] == "-> a"
    assert (local.tree()["t/a"], local.tree()["elsewhere"]) == ("A", "E")


def test_a_directory_behind_a_link_is_used_inside_the_image(local: Local) -> None:
    (local.image / "usr/lib").mkdir(parents=True, mode=0o700)
    (local.image / "usr/lib").chmod(0o700)
    (local.image / "lib").symlink_to("usr/lib")
    local.copy([*a_directory(""), *a_directory("lib"), *in_tree("lib/so", b"S")], "/")
    assert local.tree()["usr/lib/so"] == "S"
    assert local.tree()["lib"] == "-> usr/lib"
    assert local.mode("usr/lib") == 0o700


def test_a_file_onto_a_link_goes_where_it_leads_or_replaces_a_dangling_one(local: Local) -> None:
    (local.image / "real").write_text("old")
    (local.image / "link").symlink_to("/real")
    (local.image / "dangling").symlink_to("/nothing/here")
    local.copy(a_file("a", b"A"), "/link")
    local.copy(a_file("a", b"B"), "/dangling")
    assert local.tree() == {"real": "A", "link": "-> /real", "dangling": "B"}


def test_links_that_lead_out_of_the_image_are_resolved_inside_it(local: Local) -> None:
    outside = local.image.parent / "outside"
    outside.mkdir()
    (local.image / "abs").symlink_to(outside)
    (local.image / "rel").symlink_to("../outside")
    local.copy(a_file("a", b"A"), "/abs/")
    local.copy(a_file("a", b"A"), "/rel/deep/")
    assert list(outside.iterdir()) == []
    assert (local.image / "outside/deep/a").read_text() == "A"
    assert (local.image / str(outside)[1:] / "a").read_text() == "A"


# --- what it looks like ---------------------------------------------------------------------------


def test_mode_owner_and_time_are_kept_and_parents_are_plain(local: Local) -> None:
    local.copy(a_file("a", b"A", mode=0o4711, mtime_ns=1_600_000_000_123_456_789), "/p/q/a")
    status = (local.image / "p/q/a").lstat()
    assert (local.mode("p/q/a"), local.mode("p"), local.mode("p/q")) == (0o4711, 0o755, 0o755)
    assert (status.st_mtime_ns, local.owner("p/q/a")) == (1_600_000_000_123_456_789, (0, 0))


def test_times_and_modes_of_directories_are_set_after_their_content(local: Local) -> None:
    chunks = [
        *a_directory("", 0o700, mtime_ns=5_000_000_000),
        *a_directory("d", 0o1555, mtime_ns=7_000_000_000),
        *in_tree("d/f", b"F", mtime_ns=9_000_000_000),
        *a_link("d/l", "f", mtime_ns=8_000_000_000),
    ]
    local.copy(chunks, "/new")
    times = [(local.image / path).lstat().st_mtime for path in ("new", "new/d", "new/d/f", "new/d/l")]
    assert times == [5, 7, 9, 8]
    assert (local.mode("new"), local.mode("new/d")) == (0o700, 0o1555)


def test_the_destination_keeps_its_own_mode_and_directories_below_get_the_sources(local: Local) -> None:
    (local.image / "t/sub").mkdir(parents=True)
    (local.image / "t").chmod(0o1777)
    local.copy([*a_directory("", 0o700), *a_directory("sub", 0o700)], "/t")
    assert (local.mode("t"), local.mode("t/sub")) == (0o1777, 0o700)


def test_overwriting_leaves_nothing_of_the_old_file(local: Local) -> None:
    (local.image / "f").write_text("a long old content")
    os.link(local.image / "f", local.image / "other-name")
    local.copy(a_file("f", b"new"), "/f")
    assert local.tree() == {"f": "new", "other-name": "a long old content"}


@pytest.mark.parametrize(
    ("chown", "owner"),
    [("1234", (1234, 1234)), ("1234:7", (1234, 7)), ("app", (1000, 1001)), ("app:staff", (1000, 50)),
     ("0:wheel", (0, 10))],
)  # fmt: skip
def test_chown_by_name_and_number(local: Local, chown: str, owner: tuple[int, int]) -> None:
    local.copy([*a_directory(""), *in_tree("f", b"x", mode=0o6755), *a_link("l", "f")], "/p/d", chown=chown)
    assert {local.owner(path) for path in ("p", "p/d", "p/d/f", "p/d/l")} == {owner}
    assert local.mode("p/d/f") == 0o6755


@pytest.mark.parametrize("chown", ["nobody-here", "0:no-group", "", ":5", "4294967295", "-1"])
def test_a_bad_chown_is_an_error_that_names_it(local: Local, chown: str) -> None:
    error = local.refused(a_file("a"), chown=chown)
    assert f"--chown{'=' if chown in ('', ':5') else ' '}{chown}" in error.message
    assert local.tree() == {}


def test_an_archive_keeps_its_owners_unless_chown_says_otherwise(local: Local) -> None:
    chunks = [*a_directory(""), *in_tree("f", b"x", keep_owner=True, uid=7, gid=8)]
    local.copy(chunks, "/t1")
    local.copy(chunks, "/t2", chown="9")
    assert (local.owner("t1/f"), local.owner("t2/f")) == ((7, 8), (9, 9))


def test_files_of_another_stage_keep_their_owners_and_are_placed_as_every_other_file(local: Local) -> None:
    (local.image / "real").mkdir()
    (local.image / "link").symlink_to("real")
    stage = {"keep_owner": True, "of_tree": True, "uid": 7, "gid": 8}
    local.copy(a_file("single", b"x", **stage), "/link/renamed")
    local.copy([*a_directory("", **stage), *in_tree("f", b"x", **stage)], "/link")
    assert local.owner("real/renamed") == local.owner("real/f") == (7, 8)
    local.copy(a_file("single", b"x", **stage), "/mine", chown="9")
    assert local.owner("mine") == (9, 9)
    # A member of an archive would take the place of the link.
    assert (local.image / "link").is_symlink()


# --- members of archives --------------------------------------------------------------------------


def member(path: str, data: bytes = b"", **fields: object) -> list[Item]:
    return in_tree(path, data, keep_owner=True, **fields)


def member_directory(path: str, mode: int = 0o755, **fields: object) -> list[Item]:
    return a_directory(path, mode, keep_owner=True, **fields)


def member_link(path: str, target: str, *, hard: bool = False) -> list[Item]:
    return a_link(path, target, hard=hard, keep_owner=True)


@pytest.mark.parametrize("target", ["/etc", "../etc", "../../etc", "sub/../../etc"])
def test_an_archives_own_links_lead_nowhere_but_into_the_destination(local: Local, target: str) -> None:
    (local.image / "etc/passwd").write_text("precious")
    local.copy([*member_link("l", target), *member("l/passwd", b"evil")], "/dest/")
    assert (local.image / "etc/passwd").read_text() == "precious"
    assert (local.image / "dest/etc/passwd").read_text() == "evil"
    assert os.readlink(local.image / "dest/l") == target


def test_links_of_the_image_lead_an_archive_nowhere_but_into_the_destination(local: Local) -> None:
    (local.image / "dest/real").mkdir(parents=True)
    (local.image / "dest/out").symlink_to("/etc")
    (local.image / "dest/in").symlink_to("real")
    local.copy([*member("out/f", b"1"), *member("in/f", b"2")], "/dest")
    assert (local.tree()["dest/etc/f"], local.tree()["dest/real/f"]) == ("1", "2")
    assert not (local.image / "etc/f").exists()


def test_hard_links_of_an_archive_are_to_files_in_the_destination(local: Local) -> None:
    (local.image / "etc/shadow").write_text("secret")
    chunks = [
        *member_link("l", "/etc"),
        *member("l/shadow", b"own"),
        *member_link("h", "l/shadow", hard=True),
    ]
    local.copy(chunks, "/dest/")
    assert (local.image / "dest/h").read_text() == "own"


def test_the_destination_of_an_archive_may_be_behind_a_link(local: Local) -> None:
    (local.image / "usr/lib").mkdir(parents=True)
    (local.image / "lib").symlink_to("usr/lib")
    local.copy(member("so", b"S"), "/lib/")
    local.copy(member("deep/so", b"S"), "/lib/x/y")
    assert local.tree()["lib"] == "-> usr/lib"
    assert (local.tree()["usr/lib/so"], local.tree()["usr/lib/x/y/deep/so"]) == ("S", "S")


def test_a_member_takes_the_place_of_whatever_is_there(local: Local) -> None:
    deep = local.image / "one/a/b/c"
    deep.mkdir(parents=True)
    (deep / "f").write_text("old")
    (deep / "l").symlink_to("/")
    (local.image / "soft/x").mkdir(parents=True)
    (local.image / "hard/x").mkdir(parents=True)
    (local.image / "two").write_text("a file")
    (local.image / "three").symlink_to("elsewhere")
    (local.image / "elsewhere").mkdir(mode=0o700)
    chunks = [
        *member("one", b"1"),
        *member_link("soft", "one"),
        *member_link("hard", "one", hard=True),
        *member_directory("two"),
        *member_directory("three", 0o711),
        *member("three/f", b"3"),
    ]
    local.copy(chunks, "/")
    assert local.tree() == {
        "one": "1",
        "soft": "-> one",
        "hard": "1",
        "two": "dir",
        "three": "dir",
        "three/f": "3",
        "elsewhere": "dir",
    }
    assert (local.mode("three"), local.mode("elsewhere")) == (0o711, 0o700)


def test_members_take_the_place_of_earlier_ones(local: Local) -> None:
    chunks = [
        *member_directory("d", 0o700),
        *member("d/f"),
        *member("d", b"a file"),
        *member("e", b"a file"),
        *member_directory("e", 0o711),
        *member_directory("e", 0o750),
    ]
    local.copy(chunks, "/t")
    assert local.tree() == {"t": "dir", "t/d": "a file", "t/e": "dir"}
    assert local.mode("t/e") == 0o750


def test_directories_of_an_archive_are_merged_with_those_that_are_there(local: Local) -> None:
    (local.image / "t/d").mkdir(parents=True, mode=0o700)
    (local.image / "t/d/kept").write_text("K")
    (local.image / "t").chmod(0o1777)
    local.copy([*member_directory(""), *member_directory("d", 0o750), *member("d/f", b"F")], "/t")
    assert local.tree() == {"t": "dir", "t/d": "dir", "t/d/f": "F", "t/d/kept": "K"}
    assert (local.mode("t"), local.mode("t/d")) == (0o1777, 0o750)


def test_a_directory_of_great_depth_is_replaced(local: Local) -> None:
    descriptor = os.open(local.image, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    local.copy(member("d", b"a file"), "/")
    assert local.tree() == {"d": "a file"}


# --- modes ----------------------------------------------------------------------------------------


def test_chmod_applies_to_files_and_directories(local: Local) -> None:
    local.copy([*a_directory(""), *in_tree("f", b"x", mode=0o600)], "/t", chmod="u=rwX,go=rX")
    local.copy(a_file("g", mode=0o600), "/g", chmod="4750")
    assert (local.mode("t"), local.mode("t/f"), local.mode("g")) == (0o755, 0o644, 0o4750)


def test_a_bad_chmod_is_an_error(local: Local) -> None:
    assert "--chmod=rwx" in local.refused(a_file("a"), chmod="rwx").message


# --- what is refused ------------------------------------------------------------------------------


def test_a_directory_does_not_replace_a_file(local: Local) -> None:
    (local.image / "t").write_text("file")
    error = local.refused(TREE, "/t")
    assert error.message == "/t: a file is where a directory is needed"
    assert (error.reason, error.step) == ("file", 2)
    assert local.server.events == [(2, "STARTED", 0), (2, "FINISHED", 1)]


def test_a_file_or_link_does_not_replace_a_directory(local: Local) -> None:
    (local.image / "t/a").mkdir(parents=True)
    assert "/t/a: a directory is there" in local.refused(TREE, "/t").message
    assert "/t/a: a directory is there" in local.refused(a_link("a", "x"), "/t").message


def test_a_path_through_a_file_is_an_error(local: Local) -> None:
    (local.image / "f").write_text("file")
    assert "/f/x" in local.refused(a_file("a"), "/f/x").message


def test_a_loop_of_links_is_an_error(local: Local) -> None:
    (local.image / "loop").symlink_to("loop")
    assert "/loop/x: Too many levels" in local.refused(a_file("a"), "/loop/x").message


def test_a_large_file_is_streamed(local: Local) -> None:
    part = os.urandom(wire.CHUNK_BYTES)
    local.copy(a_file("f", part * 20), "/big")
    assert (local.image / "big").read_bytes() == part * 20
