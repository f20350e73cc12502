"""Removing what a build made: whatever it is, all of it, and nothing else."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap import removal
from firebuild_bootstrap.removal import remove_tree
from layers.trees import dig


@pytest.mark.parametrize(("depth", "name"), [(1500, "deep"), (2500, "d" * 255)])
def test_depth_does_not_matter(tmp_path: Path, depth: int, name: str) -> None:
    dig(tmp_path, depth, name)
    remove_tree(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_few_descriptors_are_enough_for_a_deep_tree(tmp_path: Path) -> None:
    dig(tmp_path, 2000)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))

    command = [sys.executable, "-m", "firebuild_bootstrap.removal", str(tmp_path / "deep")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (0, "", [])


def test_links_are_removed_and_what_they_name_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    (victim / "inner/link").symlink_to(tmp_path / "precious")
    (victim / "inner/loop").symlink_to(".")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(victim / "pipe")
    remove_tree(victim)
    remove_tree(tmp_path / "link")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "precious"]


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")
    remove_tree(tmp_path / "nothing/at/all")


def test_a_directory_with_more_entries_than_are_held_is_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "_MAX_HELD", 3)
    for number in range(20):
        (tmp_path / f"victim/{number}/inner").mkdir(parents=True)
        (tmp_path / f"victim/file-{number}").touch()
    remove_tree(tmp_path / "victim")
    assert os.listdir(tmp_path) == []


def as_nobody(task: Callable[[], object]) -> int:
    """Do something in a child without the rights of root; 0 when it did not raise."""
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            task()
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:
            os._exit(255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def nobodys(tmp_path: Path) -> Path:
    """A directory of the user that `as_nobody` becomes, below directories that it may search."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o1 == 0:
            parent.chmod(parent.stat().st_mode | 0o111)
    directory = tmp_path / "nobodys"
    directory.mkdir()
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)
    return directory


def test_directories_that_are_closed_to_their_owner_are_opened(nobodys: Path) -> None:
    def make_and_remove() -> None:
        (nobodys / "victim/locked/inner").mkdir(parents=True)
        (nobodys / "victim/locked/inner/file").touch()
        for name in ("victim/locked/inner", "victim/locked", "victim"):
            (nobodys / name).chmod(0)
        remove_tree(nobodys / "victim")

    assert as_nobody(make_and_remove) == 0
    assert os.listdir(nobodys) == []


@pytest.mark.needs("root")
def test_what_cannot_be_removed_is_named_and_keeps_nothing_else(nobodys: Path) -> None:
    for name in ("victim/mine/file", "victim/yours/file"):
        (nobodys / name).parent.mkdir(parents=True)
        (nobodys / name).touch()
    os.chown(nobodys / "victim", 65534, 65534)
    os.chown(nobodys / "victim/mine", 65534, 65534)

    def remove() -> None:
        with pytest.raises(PermissionError) as caught:
            remove_tree(nobodys / "victim")
        assert caught.value.filename == str(nobodys / "victim/yours/file")
        remove_tree(nobodys / "victim", ignore_errors=True)

    assert as_nobody(remove) == 0
    assert sorted(path.name for path in nobodys.rglob("*")) == ["file", "victim", "yours"]


@pytest.mark.needs("root")
def test_a_parent_that_may_not_be_searched_is_an_error_or_ignored(nobodys: Path) -> None:
    (nobodys / "closed/victim").mkdir(parents=True)
    (nobodys / "closed").chmod(0o700)

    def remove() -> None:
        remove_tree(nobodys / "closed/victim/x", ignore_errors=True)
        remove_tree(nobodys / "closed/victim/x")

    assert as_nobody(remove) == 13


@pytest.mark.needs("root")
def test_another_file_system_below_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "victim/mounted").mkdir(parents=True)
    script = (
        f"mount -t tmpfs none {tmp_path}/victim/mounted && touch {tmp_path}/victim/mounted/kept && "
        f"{sys.executable} -m firebuild_bootstrap.removal {tmp_path}/victim; ls {tmp_path}/victim/mounted"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "kept\n"
    assert "victim/mounted: another file system is mounted there" in done.stderr


def test_somebody_who_moves_directories_about_leads_the_removal_nowhere_else(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "a/b").mkdir(parents=True)
    (precious / "file").touch()
    victim = tmp_path / "victim"
    over = threading.Event()

    def swap() -> None:
        # What the removal stands in is moved below another directory, whose `..` it then finds.
        while not over.is_set():
            try:
                os.rename(victim / "a/b", precious / "a/b/moved")
                os.rename(precious / "a/b/moved", victim / "a/b")
            except OSError:
                continue

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(100):
            (victim / "a").mkdir(parents=True, exist_ok=True)
            if not (precious / "a/b/moved").exists():
                with suppress(FileNotFoundError):  # it was just moved
                    (victim / "a/b/c/d").mkdir(parents=True, exist_ok=True)
            remove_tree(victim, ignore_errors=True)
    finally:
        over.set()
        thread.join()
    assert (precious / "file").exists()
    assert (precious / "a/b").is_dir()
