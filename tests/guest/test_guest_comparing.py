"""Layers without overlays: what listings before and after a step tell of it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.guest import kernel, netfiles
from firebuild_bootstrap.guest.comparing import Comparing
from firebuild_bootstrap.guest.errors import StepError
from firebuild_bootstrap.guest.netfiles import network_files
from firebuild_bootstrap.guest.overlay import mount_layers
from firebuild_bootstrap.layers.apply import apply
from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.layers.tar import FILE, LayerError
from firebuild_bootstrap.layers.tree import TreeSource, statuses, tree_entries, upper_entries
from firebuild_bootstrap.sandbox import Bind
from guest.build import Build, copy_command, run_command
from guest.server import a_directory, in_tree
from support import privately


def picture(root: Path) -> list[Any]:
    """All that can be said of a tree but for inode numbers: entries, with contents."""
    found = []
    for entry, content in tree_entries(str(root)):
        data = os.pread(cast(int, content), 1 << 20, 0) if entry.kind == FILE else b""
        found.append((entry, data))
    return found


def changes(layer: Path) -> list[str]:
    return [f"{item.kind} {item.path}" for item, _ in upper_entries(str(layer / "fs")) if item.path]


class Image:
    """A tree that steps change, and what the layers of these make of its first state."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "image"
        self.copy = directory / "copy"
        self.state = directory / "state"
        self.root.mkdir()

    def begin(self) -> None:
        self.copy.mkdir()
        with Root(str(self.copy)) as copy:
            apply(TreeSource(tree_entries(str(self.root))), copy)
        self.comparing = Comparing(str(self.state), str(self.root))

    def check(self, step: int) -> None:
        with Root(str(self.copy)) as copy:
            files = upper_entries(str(self.state / f"upper/{step}/fs"))
            apply(TreeSource(files, whiteouts=True), copy)
        assert picture(self.copy) == picture(self.root)


names = st.sampled_from("abc")
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
operations = st.tuples(
    st.sampled_from(
        ["write", "touch back", "mkdir", "remove", "rename", "link", "symlink", "chmod", "mkfifo", "xattr"]
    ),
    paths,
    paths,
    st.integers(0, 3),
)


def write(path: Path, number: int) -> None:
    # O_NONBLOCK: a pipe that nobody reads is an error, and not waited for.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK
    with open(os.open(path, flags, 0o644), "w") as file:
        file.write(str(number))


def do(root: Path, what: str, path: Path, other: Path, number: int) -> None:
    """One of the things that a step may do."""
    match what:
        case "write":
            write(path, number)
        case "touch back":  # the same size and time as before
            times = path.stat().st_atime_ns, path.stat().st_mtime_ns
            write(path, number)
            os.utime(path, ns=times)
        case "mkdir":
            path.mkdir()
        case "remove":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        case "rename":
            path.rename(other)
        case "link":
            os.link(path, other, follow_symlinks=False)
        case "symlink":
            path.symlink_to(str(number))
        case "chmod":
            path.chmod(0o700 + number)
        case "mkfifo":
            os.mkfifo(path)
        case "xattr":
            os.setxattr(path, "user.note", str(number).encode())


@settings(max_examples=60, deadline=None)
@example([], [[("symlink", "a", "a", 0), ("link", "a", "b", 0)], [("remove", "a", "a", 0)]])
@example([("mkfifo", "a", "a", 0)], [[("link", "a", "b", 0)], [("rename", "b", "c", 0)]])
@given(st.lists(operations, max_size=12), st.lists(st.lists(operations, max_size=5), max_size=3))
def test_layers_on_the_first_state_give_the_last(first: list[Any], steps: list[list[Any]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = Image(Path(directory))

        def run(operations: list[Any]) -> None:
            for what, path, other, number in operations:
                try:
                    do(image.root, what, image.root / path, image.root / other, number)
                except OSError:
                    continue

        run(first)
        image.begin()
        for number, step in enumerate(steps, 2):
            with image.comparing.step(number):
                run(step)
            image.check(number)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    image = Image(tmp_path)
    for name in ("etc/hosts", "etc/deep/file", "other/file", "gone/file"):
        (image.root / name).parent.mkdir(parents=True, exist_ok=True)
        (image.root / name).write_text(name)
    os.link(image.root / "etc/hosts", image.root / "etc/name")
    image.begin()
    return image


@pytest.mark.root
def test_a_layer_holds_what_was_changed_and_the_way_to_it(image: Image) -> None:
    with image.comparing.step(2):
        (image.root / "etc/deep/file").chmod(0o600)
        shutil.rmtree(image.root / "gone")
        (image.root / "other/file").unlink()
    image.check(2)
    upper = image.state / "upper"
    expected = ["whiteout gone", "directory etc", "directory etc/deep", "file etc/deep/file"]
    assert changes(upper / "2") == [*expected, "directory other", "whiteout other/file"]
    with image.comparing.step(3):
        pass
    assert changes(upper / "3") == []
    with image.comparing.step(4):  # a directory that has become another one
        (image.root / "etc/deep").rename(image.root / "moved")
        (image.root / "etc/deep").mkdir()
        (image.root / "moved/new").touch()
    image.check(4)
    assert changes(upper / "4") == [
        *("directory etc", "directory etc/deep", "whiteout etc/deep/file"),
        *("directory moved", "file moved/file", "file moved/new"),
    ]
    with image.comparing.step(5):  # both names are in the layer, so that it stays one file
        (image.root / "etc/name").write_text("more")
    image.check(5)
    assert changes(upper / "5") == ["directory etc", "file etc/hosts", "hardlink etc/name"]
    assert not (image.state / "unfinished").exists()


@pytest.mark.needs("bwrap", "busybox")
def test_a_base_is_copied_which_is_said_once_and_is_in_no_layer(build: Build) -> None:
    layers = build.directory / "layers"
    (layers / "base/etc").mkdir(parents=True)
    (layers / "base/etc/of-the-base").write_text("base\n")
    (layers / "base").chmod(0o755)
    build.extra_binds = [Bind(layers, "/layers", read_only=False)]
    build.arguments = ["--layers", "/layers"]
    build.succeed(run_command("cat /etc/of-the-base; echo > /new", step=2), run_command("true", step=3))
    assert build.server.stdout == b"base\n"
    said = build.server.written("stderr").decode()
    assert said.count("firebuild: the kernel") == said.count("was copied, in ") == 1
    assert [changes(layers / f"upper/{step}") for step in (2, 3)] == [["file new"], []]


@pytest.mark.needs("bwrap", "busybox")
def test_a_directory_is_copied_into_one_that_the_copy_makes(build: Build) -> None:
    layers = build.directory / "layers"
    layers.mkdir()
    build.extra_binds = [Bind(layers, "/layers", read_only=False)]
    build.arguments = ["--layers", "/layers"]
    build.server.resources["files"] = [*a_directory(""), *a_directory("sub"), *in_tree("sub/file", b"x")]
    build.succeed(copy_command("/new"), run_command("cat /new/sub/file", step=3))
    assert build.server.stdout == b"x"
    assert changes(layers / "upper/2") == ["directory new", "directory new/sub", "file new/sub/file"]


@pytest.mark.root
def test_a_base_that_does_not_fit_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "state/base").mkdir(parents=True)
    (tmp_path / "state/base/large").write_bytes(bytes(1 << 20))

    def fill() -> None:
        kernel.mount("tmpfs", str(tmp_path / "image"), "tmpfs", 0, "size=64k")
        (tmp_path / "image/other").write_bytes(b"x" * 60_000)
        with open(tmp_path / "state/base/large", "r+b") as file:
            file.write(b"x" * 100_000)
        with pytest.raises(StepError, match="can't be copied to the drive: No space left on device"):
            Comparing(str(tmp_path / "state"), str(tmp_path / "image"))

    privately(fill)


def test_layers_that_are_there_lie_between_those_that_are_made(image: Image) -> None:
    for step, name in ((3, "3"), (4, "etc/hosts"), (9, "later")):
        file = image.state / f"between/{step}" / name
        file.parent.mkdir(parents=True)
        file.write_text(f"between {step}")
    comparing = Comparing(str(image.state), str(image.root))
    seen = []
    for number in (2, 5):
        with comparing.step(number, linked=number == 2) as path:
            seen.append([(image.root / "etc/hosts").read_text(), (image.root / "3").exists()])
            Path(path, "new").touch()
    assert seen == [["etc/hosts", False], ["between 4", True]]
    assert changes(image.state / "upper/5") == ["file new"]
    assert not (image.root / "later").exists()


def test_a_file_of_the_network_stays_one_file_with_its_other_names(image: Image) -> None:
    etc = image.root / "etc"

    def step(number: int, text: str) -> list[str]:
        with image.comparing.step(number) as path, Root(path) as root, network_files(root):
            assert (etc / "hosts").read_text() == Path("/etc/hosts").read_text()
            if text:
                (etc / "name").write_text(text)
        image.check(number)
        assert (etc / "hosts").samefile(etc / "name")
        return changes(image.state / f"upper/{number}")

    assert step(2, "") == []
    assert step(3, "new") == ["directory etc", "file etc/hosts", "hardlink etc/name"]


def test_a_file_of_the_network_is_closed_before_it_is_removed(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FUSE and NFS would keep it, under another name, and change its directory when it is closed at last.
    removed = []

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def unlink(self, name: str, *, dir_fd: int) -> None:
            status = os.stat(name, dir_fd=dir_fd)
            paths = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
            removed.append((name, [path for path in paths if os.path.samestat(path.stat(), status)]))
            os.unlink(name, dir_fd=dir_fd)

    os.unlink(image.root / "etc/name")
    with Root(str(image.root)) as root, monkeypatch.context() as replaced:
        replaced.setattr(netfiles, "os", Os())
        with network_files(root):
            pass
    assert ("hosts", []) in removed
    assert [is_open for _, is_open in removed if is_open] == []
    assert (image.root / "etc/hosts").read_text() == "etc/hosts"


def test_what_was_lent_and_put_back_is_no_change(image: Image) -> None:
    etc = image.root / "etc"
    os.unlink(etc / "name")
    with image.comparing.step(2):
        pass
    times = os.stat(etc).st_atime_ns, os.stat(etc).st_mtime_ns
    with image.comparing.step(3):
        image.comparing.borrow("/etc/deep")
        (etc / "hosts").rename(etc / "aside")
        (etc / "aside").rename(etc / "hosts")
        (etc / "deep").chmod(0o700)
        (etc / "deep").chmod(0o755)
        os.utime(etc, ns=times)
    assert changes(image.state / "upper/3") == []


@pytest.mark.root
def test_a_change_within_the_same_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    def run() -> None:
        # Newer kernels count finer on most file systems, but not on this one.
        kernel.mount("ramfs", str(tmp_path), "ramfs", 0, "")
        image = Image(tmp_path)
        file = image.root / "file"
        file.write_text(f"{0:09}")
        image.begin()
        for step in range(2, 30):
            times = file.stat().st_atime_ns, file.stat().st_mtime_ns
            with image.comparing.step(step):
                file.write_text(f"{step:09}")
                os.utime(file, ns=times)
            assert changes(image.state / f"upper/{step}") == ["file file"]

    privately(run)


def test_a_step_that_fails_leaves_no_layer(image: Image) -> None:
    with pytest.raises(KeyError), image.comparing.step(2):
        raise KeyError
    assert os.listdir(image.state / "upper") == []


def test_a_name_that_means_a_whiteout_fails_the_step_that_made_it(image: Image) -> None:
    with pytest.raises(LayerError, match=r"/other/\.wh\.x can't be kept in a layer"), image.comparing.step(2):
        (image.root / "other/.wh.x").mkdir()


def test_a_layer_that_cannot_be_written_is_a_failed_step(image: Image) -> None:
    with pytest.raises(OSError, match="unfinished"), image.comparing.step(2):
        (image.state / "unfinished").touch()


@pytest.mark.root
def test_what_is_mounted_in_the_image_is_not_of_it(image: Image) -> None:
    def run() -> None:
        with image.comparing.step(2):
            kernel.mount("tmpfs", str(image.root / "gone"), "tmpfs", 0, "")
            (image.root / "gone/mounted").touch()
            assert "gone/mounted" not in dict(statuses(str(image.root)))
            kernel.unmount(str(image.root / "gone"))

    privately(run)
    assert stat.S_ISDIR((image.root / "gone").stat().st_mode)


@pytest.mark.root
def test_on_an_overlay_a_whiteout_is_a_mark_and_the_layer_is_not_mounted(tmp_path: Path) -> None:
    for name in ("lower/0", "lower/1", "upper", "work", "merged"):
        (tmp_path / name).mkdir(parents=True)

    def run() -> None:
        mount_layers(str(tmp_path), ["lower/0", "lower/1"], str(tmp_path / "merged"), "upper", "work")
        image = Image(tmp_path / "merged")
        for name in ("gone", "kept"):
            (image.root / name).touch()
        image.begin()
        with image.comparing.step(2):
            (image.root / "gone").unlink()
        image.check(2)
        upper = image.state / "upper"
        assert changes(upper / "2") == ["whiteout gone"]
        (image.state / "empty").mkdir()
        with pytest.raises(OSError, match="made where no overlay can be"):
            mount_layers(str(image.state), ["empty", "upper/2/fs"], str(tmp_path / "work"))

    privately(run)
