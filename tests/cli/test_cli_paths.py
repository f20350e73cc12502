"""Paths that the user names: what can't work is status 2, in words, before anything starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.cli import paths
from firebuild_bootstrap.cli.paths import check_can_be_made
from firebuild_bootstrap.errors import InputError

pytestmark = pytest.mark.needs("userns")

LONG = "a" * 300
BAD = ("/proc/self/x", "file/x", "loop/x", "dangling/x", LONG, f"{LONG}/x", "/dev/null")


@pytest.fixture
def here(cli: Cli) -> Cli:
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    Path("file").touch()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    return cli


def refused(cli: Cli, *arguments: str) -> str:
    before = sorted(os.listdir())
    done = cli(*arguments, status=2)
    assert (done.out, done.err.count("error:")) == ("", 1)
    assert sorted(os.listdir()) == before
    return done.first


@pytest.mark.parametrize("path", [*BAD, "none/x"])
@pytest.mark.parametrize(
    "option",
    ["--metadata-file", "--iidfile", "--output=tar,dest=", "--output=dir,dest=", "--output=ext4,dest="],
)
def test_a_file_that_could_not_be_written_in_the_end(here: Cli, option: str, path: str) -> None:
    arguments = [f"{option}{path}"] if option.endswith("=") else [option, path]
    assert "can't be written: " in refused(here, "build", *arguments, ".")


@pytest.mark.parametrize("path", BAD)
def test_a_directory_that_could_not_be_made(here: Cli, path: str) -> None:
    assert refused(here, "build", f"--cache-to=type=local,dest={path}", ".").startswith("error: --cache-to: ")
    assert refused(here, "build", f"--keep-on-failure={path}", ".").startswith("error: --keep-on-failure: ")
    refused(here, "ca", "issue", "--server", "b1", "--out", path)


@pytest.mark.parametrize("path", [*BAD, "file", "loop", "dangling"])
@pytest.mark.parametrize(
    "command",
    [
        ["build", "-q", "."],
        ["base", "import", "x", "."],
        ["base", "from-host"],
        ["base", "rm", "x"],
        ["images", "rm", "x"],
        ["images", "tag", "x", "y"],
        ["images", "prune"],
        ["initramfs", "build"],
    ],
    ids=" ".join,
)
def test_a_store_that_can_not_be_written(here: Cli, command: list[str], path: str) -> None:
    here.setenv("FIREBUILD_HOME", path)
    error = refused(here, *command)
    # Whoever measures it first may find out that it can't even be read.
    read_first = command == ["images", "prune"] and "the store can't be read: " in error
    assert "the store can't be written: " in error or read_first


@pytest.mark.parametrize("path", ["file/x", "loop/x", "loop", "dangling", LONG, "file", "/dev/null"])
@pytest.mark.parametrize("command", ["images list", "base list", "du", "images inspect x", "images prune -n"])
def test_a_store_that_can_not_be_read(here: Cli, command: str, path: str) -> None:
    here.setenv("FIREBUILD_HOME", path)
    assert "the store can't be read: " in refused(here, *command.split())


def test_a_store_that_is_not_there_yet_is_empty(here: Cli) -> None:
    here.setenv("FIREBUILD_HOME", "none/yet")
    assert here("images", "list", "--json").out == "[]\n"
    assert here("du").out.split() == [
        "KIND",
        "NAME",
        "SIZE",
        "total",
        str(Path("none/yet").absolute()),
        "0",
        "B",
    ]
    assert here("images", "prune", "-n", "--failed").out == ""
    assert not Path("none").exists()


@pytest.mark.parametrize("path", [*BAD, "none/x", "loop", "dangling"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "-f"],
        ["build", "--config"],
        ["build"],
        ["base", "import", "x"],
        ["base", "import", "x", ".", "--image-config"],
    ],
    ids=" ".join,
)
def test_a_file_that_can_not_be_read(here: Cli, arguments: list[str], path: str) -> None:
    if "--config" in arguments and path == "/dev/null":
        return  # an empty configuration
    refused(here, *arguments, path)


@pytest.mark.parametrize("path", [*BAD, "none", "loop", "dangling", "file", ".", "..", "/"])
def test_a_tree_that_can_not_be_removed(here: Cli, path: str) -> None:
    assert path in refused(here, "rm-tree", path)


def test_what_is_dear_is_not_removed(here: Cli, tmp_path: Path) -> None:
    Path("tree").mkdir()
    Path("link").symlink_to("tree")
    assert refused(here, "rm-tree", "link") == "error: link is a symbolic link"
    here.setenv("FIREBUILD_HOME", Path("tree/home").absolute())
    here("images", "prune")
    assert refused(here, "rm-tree", "tree") == "error: tree can't be removed: it is the store, or holds it"
    whole = here("rm-tree", "tree/home", status=2).err
    assert "hint: to remove it whole, name what is in it: tree/home/*" in whole
    here("rm-tree", *map(str, Path("tree/home").iterdir()))
    Path("tree/home").rmdir()
    here.setenv("HOME", Path("tree").absolute())
    here.setenv("FIREBUILD_HOME", tmp_path / "home")
    assert "it is your home, or holds it" in refused(here, "rm-tree", "tree")
    assert "the root of a file system" in refused(here, "rm-tree", "/proc")


def test_names_as_long_as_linux_allows_are_written(here: Cli) -> None:
    names = [letter * 255 for letter in "abcd"]
    here(
        "build",
        "-q",
        "--metadata-file",
        names[0],
        "--iidfile",
        names[1],
        "-o",
        f"tar,dest={names[2]}",
        "-o",
        names[3],
    )
    assert all(Path(name).exists() for name in names)
    here("initramfs", "build", "--compress", "none", "--output", names[0])


def test_a_device_is_never_replaced_by_a_file(here: Cli) -> None:
    for option in ("--metadata-file", "--iidfile"):
        assert "/dev/null can't be written: it is not a regular file" in refused(
            here, "build", option, "/dev/null", "."
        )
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    "arguments", ["build -o tar,dest=out .", "build --iidfile out .", "save tiny -o out"]
)
def test_a_link_to_an_open_file_as_dev_stdout_is_one_is_never_replaced(
    arguments: str, here: Cli, tmp_path: Path
) -> None:
    here("build", "-q", "-t", "tiny", ".")
    Path("out").symlink_to("/proc/self/fd/1")
    with open("redirected", "wb") as file:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("firebuild")), *arguments.split()],
            env={**os.environ, "FIREBUILD_HOME": str(here.home)},
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert "out can't be written: it is a link to an open file\n  hint: name the file itself; " in done.stderr
    assert os.readlink("out") == "/proc/self/fd/1"
    assert not Path("redirected").stat().st_size


def test_a_disk_that_fails_is_not_the_user_s_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        paths.check_store(tmp_path / "x", writable=True, setting="FIREBUILD_HOME")


def test_rights_are_asked_for_and_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match="x can't be written: Permission denied"):
        paths.check_writable(tmp_path / "x")
    with pytest.raises(InputError, match=r"--out: .* can't be written: Permission denied"):
        paths.check_can_be_made(tmp_path / "x/y", "--out: ")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="x can't be written: no right to write in"):
        paths.check_writable(tmp_path / "x")
    with pytest.raises(InputError, match="the store can't be read: no right to do that"):
        paths.check_store(tmp_path, writable=False, setting="FIREBUILD_HOME")


def test_a_part_of_the_store_that_is_somebody_else_s_is_found_before_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images/names").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, _: "names" not in str(path))
    with pytest.raises(InputError, match="images/names: the store can't be written: no right to do that"):
        paths.check_store(tmp_path, writable=True, setting="FIREBUILD_HOME")


@pytest.mark.root
@pytest.mark.needs("root")
def test_root_is_refused_the_store_of_a_user(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "home"
    (store / "builds").mkdir(parents=True)
    for path in (store, store / "builds"):
        os.chown(path, 54321, 54321)
    monkeypatch.setenv("FIREBUILD_HOME", str(store))
    done = cli("build", "-q", ".", status=2)
    assert done.err.startswith(
        f"error: {store}: the store belongs to the user #54321, who could neither use nor remove what root"
    )
    assert "`sudo -u #54321 firebuild …`; for a store of root's set FIREBUILD_HOME to another" in done.err
    assert os.listdir(store) == ["builds"]
    cli("images", "list")  # which reads only
    # A volume of a container that belongs to whoever made it: nobody else has written there.
    os.rmdir(store / "builds")
    paths.check_store(store, writable=True, setting="FIREBUILD_HOME")
    (store / "builds").mkdir()
    paths.check_store(store, writable=True, setting="FIREBUILD_HOME")


@pytest.mark.root
@pytest.mark.needs("root")
def test_sudo_makes_no_store_in_the_home_that_it_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chown(tmp_path, 54321, 54321)
    store = tmp_path / ".local/share/firebuild"
    monkeypatch.delenv("FIREBUILD_HOME", raising=False)
    monkeypatch.setenv("SUDO_UID", "54321")
    with pytest.raises(InputError, match="the store belongs to the user #54321") as refusal:
        paths.check_store(store, writable=True, setting="FIREBUILD_HOME")
    assert "`sudo -H`" in str(refusal.value.hint)
    assert os.listdir(tmp_path) == []
    # Of a container's root nobody knows that; what is named was meant.
    paths.check_store(tmp_path / "named", writable=True, setting="store.path")
    monkeypatch.delenv("SUDO_UID")
    paths.check_store(store, writable=True, setting="FIREBUILD_HOME")


def test_a_store_on_a_read_only_file_system_is_not_called_a_matter_of_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = os.statvfs_result((*os.statvfs(tmp_path)[:8], os.ST_RDONLY, 255))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: mounted)
    with pytest.raises(InputError, match="the store can't be written: the file system is read-only"):
        paths.check_store(tmp_path, writable=True, setting="FIREBUILD_HOME")


def test_a_directory_behind_a_dangling_link_can_not_be_made(here: Cli) -> None:
    assert here.home
    with pytest.raises(InputError, match="dangling is a dangling symbolic link\n  hint: make what"):
        check_can_be_made(Path("dangling/below"))
