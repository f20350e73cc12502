"""The image as an overlay: what each step has changed is a directory of its own."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firebuild_bootstrap import wire
from firebuild_bootstrap.guest.copy import Copier, Incoming
from firebuild_bootstrap.guest.overlay import Layers, mount_layers
from firebuild_bootstrap.guest.users import Users
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.root import Root, remove_directory
from firebuild_bootstrap.layers.tree import MAX_LAYERS, OVERLAY_MARKS, UNMOUNTABLE, upper_entries
from firebuild_bootstrap.sandbox import Bind
from guest.build import DEFAULT_ACL, Build, copy_command, run_command, workdir_command
from guest.server import a_file
from support import privately

BELOW = 1_300_000_000_000_000_000


@pytest.fixture
def layers(build: Build) -> Path:
    """Where vminit keeps the layers; the build's image is the lower one."""
    directory = build.directory / "layers"
    (directory / "lower/0").mkdir(parents=True)
    (directory / "lower/1").mkdir()
    build.extra_binds = [
        Bind(directory, "/layers", read_only=False),
        Bind(build.image, "/layers/lower/1"),
    ]
    build.arguments = ["--layers", "/layers"]
    return directory


def changes(layers: Path, step: int | str) -> list[str]:
    """What a layer says, as `KIND path`, without the root itself."""
    directory = layers / "unfinished" if step == "unfinished" else layers / "upper" / str(step)
    return [f"{item.kind} {item.path}" for item, _ in upper_entries(str(directory / "fs")) if item.path]


@pytest.mark.needs("bwrap", "busybox")
def test_each_step_leaves_a_layer_of_its_own(build: Build, layers: Path) -> None:
    image = build.image
    for name in ("old/deep", "proc", "dev"):
        (image / name).mkdir(parents=True)
    for name in ("old/deep/file", "old/gone", "etc/hosts", "same", "suid"):
        (image / name).write_text(f"{name}\n")
    os.link(image / "same", image / "also")
    os.link(image / "etc/hosts", image / "etc/other")
    (image / "suid").chmod(0o4755)
    (image / "etc/resolv.conf").symlink_to("/run/resolv.conf")
    (image / "etc").chmod(0o2711)
    os.setxattr(image, "user.note", b"of the root")
    for name in ("etc/hosts", "etc", "old", "."):
        os.utime(image / name, ns=(BELOW, BELOW))
    build.server.resources["files"] = a_file("new", b"content")
    before = {path: path.lstat().st_mtime_ns for path in image.rglob("*")}
    build.succeed(
        run_command("rm /old/gone && cat /etc/hosts && id -u", step=2),
        run_command("rm -r /old && /bin/busybox mkdir /old && echo mine > /old/mine", step=3),
        run_command("true=1", step=4),
        copy_command("/to/new", step=5),
        run_command("echo more >> /suid && /bin/busybox mv /to/new /to/moved && cat /to/moved", step=6),
        workdir_command("/work/here", step=7),
        run_command("echo 10.0.0.1 extra >> /etc/hosts; echo more >> /same; cat /also", step=8),
    )
    assert changes(layers, 2) == ["directory old", "whiteout old/gone"]
    assert changes(layers, 3) == ["directory old", "opaque old", "file old/mine"]
    assert changes(layers, 4) == []
    assert changes(layers, 5) == ["directory to", "file to/new"]
    assert changes(layers, 6) == ["file suid", "directory to", "whiteout to/new", "file to/moved"]
    assert changes(layers, 7) == ["directory work", "directory work/here"]
    assert changes(layers, 8) == ["directory etc", "file etc/hosts", "file same"]
    upper = layers / "upper"
    # A write takes the set-user-ID bit away, as ever; the copy that it makes does not.
    assert (upper / "6/fs/suid").read_text() == "suid\nmore\n"
    assert (upper / "8/fs/etc/hosts").read_text() == "etc/hosts\n10.0.0.1 extra\n"
    # A file below with two names is two files as soon as one is changed, as in every overlay.
    assert build.server.stdout.endswith(b"contentsame\n")
    # The root and the directories on the way keep what they have.
    for step in (2, 4, 7):
        found = (upper / str(step) / "fs").stat()
        assert stat.S_IMODE(found.st_mode) == 0o755
    assert os.getxattr(upper / "8/fs", "user.note") == b"of the root"
    assert (upper / "2/fs").stat().st_mtime_ns == BELOW
    assert stat.S_IMODE((upper / "8/fs/etc").stat().st_mode) == 0o2711
    assert {path: path.lstat().st_mtime_ns for path in image.rglob("*")} == before, "nobody writes below"
    assert not (layers / "unfinished").exists()


@pytest.mark.needs("bwrap")
def test_an_image_from_scratch_begins_with_an_empty_layer(build: Build, layers: Path) -> None:
    (layers / "lower/1").rmdir()
    build.extra_binds = build.extra_binds[:1]
    build.server.resources["files"] = a_file("hosts", b"content")
    build.succeed(copy_command("/etc/", step=2), workdir_command("/etc/more", step=3))
    assert changes(layers, 2) == ["directory etc", "file etc/hosts"]
    assert changes(layers, 3) == ["directory etc", "directory etc/more"]


@pytest.mark.needs("bwrap", "busybox")
@pytest.mark.parametrize(
    ("shell", "change"),
    [
        ("rm -r /etc && echo x > /etc", "file etc"),
        ("/bin/busybox cp -a /etc /old && rm -r /etc && /bin/busybox ln -s old /etc", "symlink etc"),
        ("rm -r /etc && /bin/busybox mkdir /etc", "opaque etc"),
        ("rm /etc/hosts && /bin/busybox mkfifo /etc/hosts", "fifo etc/hosts"),
        ("rm /etc/resolv.conf && /bin/busybox ln -s x /etc/resolv.conf", "symlink etc/resolv.conf"),
    ],
)
def test_a_step_may_put_something_else_in_the_place_of_the_networks_files(
    build: Build, layers: Path, shell: str, change: str
) -> None:
    build.succeed(run_command(shell))
    assert change in changes(layers, 2)


@pytest.mark.needs("bwrap", "busybox")
def test_a_step_that_fails_leaves_its_layer_unfinished(build: Build, layers: Path) -> None:
    build.fail(run_command("echo 1 > /one", step=2), run_command("echo 2 > /two; exit 7", step=3))
    assert changes(layers, 2) == ["file one"]
    assert "file two" in changes(layers, "unfinished")
    assert os.listdir(layers / "upper") == ["2"]


@pytest.mark.needs("bwrap", "busybox")
@pytest.mark.parametrize(
    "command",
    [
        run_command("echo > /etc/.wh.x", step=3),
        copy_command("/etc/.wh.x", step=3),
        copy_command("/etc/.wh.x", step=3, link=True),
        workdir_command("/etc/.wh.x/more", step=3),
    ],
)
def test_a_name_that_means_a_whiteout_fails_the_step_that_made_it(
    build: Build, layers: Path, command: wire.AnyCommand
) -> None:
    build.server.resources["files"] = a_file("f", b"content")
    abort = build.fail(workdir_command("/work"), command)
    assert "/etc/.wh.x can't be kept in a layer" in abort.error
    assert "give it another name" in abort.error
    assert (abort.step, abort.reason) == (3, "file")
    assert os.listdir(layers / "upper") == ["2"]


@pytest.mark.needs("bwrap", "busybox")
def test_a_run_sees_the_overlay_and_neither_its_layers_nor_their_names(build: Build, layers: Path) -> None:
    build.succeed(
        run_command("echo x > /x", step=2),
        run_command("ls -a / /layers /image; /bin/busybox grep ' / ' /proc/self/mountinfo", step=3),
    )
    text = build.server.stdout.decode()
    assert "nosuid,nodev" in text
    assert "lowerdir=upper/2/fs:lower/1:lower/0," in text
    assert str(build.directory) not in text
    assert "unfinished\n" not in text
    assert build.server.written("stderr").decode().count("No such file or directory") == 2


@pytest.mark.needs("bwrap")
def test_a_layer_that_cannot_be_mounted_is_a_failed_step(build: Build, layers: Path) -> None:
    os.setxattr(layers / "lower/0", UNMOUNTABLE, b"y")
    abort = build.fail(workdir_command("/x", step=2))
    assert "a layer was made where no overlay can be" in abort.error
    assert (abort.step, abort.reason) == (2, "file")


# --- as the machine's own root, without a user namespace ------------------------------------------


@pytest.mark.root
@pytest.mark.needs("root")
def test_as_many_layers_are_mounted_as_one_mount_takes_and_more_are_merged(tmp_path: Path) -> None:
    first = 10_000 - MAX_LAYERS  # the longest names
    for name in ("lower/0", *(f"upper/{number}/fs" for number in range(first, 10_000 - 1)), "image", "work"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "lower/0/other").symlink_to("file")
    (tmp_path / "lower/0/null").touch()
    seen = []

    def build() -> None:
        layers = Layers(str(tmp_path), str(tmp_path / "image"))
        layers._names += [f"upper/{number}/fs" for number in range(first, 10_000 - 1)]
        for step in range(9_999, 9_999 + MAX_LAYERS + 2):
            with layers.step(step):
                image = tmp_path / "image"
                seen.append(((image / "file").read_text(), len(os.listdir(image))))
                (image / "file").unlink()
                (image / "file").write_text(f"step {step}")
                (image / f"{step}").touch()
                (image / f"{step - 1}").unlink(missing_ok=True)
                folded.append(os.listdir(tmp_path / "folded") if step > 9_999 else [])

    folded: list[list[str]] = []
    privately(build)
    assert seen[:3] == [("upper/9998/fs", 3), ("step 9999", 4), ("step 10000", 4)]
    assert set(seen[3:]) == {(f"step {number}", 4) for number in range(10_001, 9_999 + MAX_LAYERS + 1)}
    assert [folded[0], folded[1], folded[-2], folded[-1]] == [[], ["10000"], ["10000"], ["10240"]]


@pytest.mark.root
@pytest.mark.needs("root")
def test_a_root_that_is_still_in_use_is_taken_away_nevertheless(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"lower/{number}").mkdir(parents=True)

    def build() -> None:
        layers = Layers(str(tmp_path), str(tmp_path / "image"))
        with layers.step(1):
            held = os.open(tmp_path / "image", os.O_RDONLY)
        try:
            assert os.listdir(tmp_path / "image") == []
        finally:
            os.close(held)

    privately(build)
    assert os.listdir(tmp_path / "upper") == ["1"]


@pytest.mark.root
@pytest.mark.needs("root")
def test_marks_that_a_step_sets_itself_change_neither_its_layer_nor_those_above(tmp_path: Path) -> None:
    for name in ("lower/0", "lower/1/d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/1/d/below").touch()
    image = tmp_path / "image"

    def build() -> None:
        layers = Layers(str(tmp_path), str(image))
        with layers.step(1):
            (image / "empty").touch()
            for mark in ("user.firebuild.", "trusted.overlay.", "user.overlay."):
                for path, names in (
                    (image, "unmountable"),
                    (image / "empty", "whiteout"),
                    (image / "d", "opaque"),
                ):
                    with suppress(OSError):
                        os.setxattr(path, mark + names, b"y")
        with layers.step(2):
            assert sorted(os.listdir(image)) == ["d", "empty"]
            assert os.listdir(image / "d") == ["below"]

    privately(build)
    entries = upper_entries(str(tmp_path / "upper/1/fs"), marks=(OVERLAY_MARKS[0],))
    assert [(item.path, item.kind) for item, _ in entries] == [
        *(("", "directory"), ("d", "directory"), ("empty", "file")),
    ]


@pytest.mark.root
@pytest.mark.needs("root")
def test_directories_of_a_lower_layer_are_removed_at_any_depth(tmp_path: Path) -> None:
    names = [f"{number:0100}" for number in range(60)]
    for name in ("lower/0", "lower/1", "upper", "work", "image"):
        (tmp_path / name).mkdir(parents=True)
    with Root(str(tmp_path / "lower/1")) as root:
        for depth in range(len(names)):
            with root.locate(f"top/{'/'.join(names[: depth + 1])}", parents=(0, 0)) as place:
                os.mkdir(place.name, dir_fd=place.directory)

    def remove() -> None:
        mount_layers(str(tmp_path), ["lower/0", "lower/1"], str(tmp_path / "image"), "upper", "work")
        with Root(str(tmp_path / "image")) as image:
            remove_directory("top", image.descriptor)
        assert os.listdir(tmp_path / "image") == []

    privately(remove)
    assert stat.S_ISCHR((tmp_path / "upper/top").lstat().st_mode)


def in_trees(*entries: tar.Entry) -> Iterator[Incoming]:
    """What a COPY of directories sends; the content of a file is its path."""
    for entry in entries:

        def write(descriptor: int, content: bytes = entry.path.encode()) -> None:
            os.write(descriptor, content)

        yield Incoming(entry, write, from_directory=True)


@pytest.mark.root
@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("target", "direct"),
    [
        ("/new/", ["/new"]),
        ("/gone/", ["/gone"]),
        ("/there/", ["/there/sub"]),
        ("/link/", []),  # nothing is entered by a path with links
        ("/", ["/sub"]),
    ],
)
def test_a_copy_through_an_overlay_comes_out_as_one_into_a_directory(
    tmp_path: Path, target: str, direct: list[str]
) -> None:
    """What the step itself makes, it fills in its layer: `direct` are the directories entered there."""
    for name in ("plain", "lower/0"):
        (tmp_path / name / "there/old").mkdir(parents=True)
        (tmp_path / name / "there/old/deep").write_text("below")
        (tmp_path / name / "link").symlink_to("there")
        (tmp_path / name / "there/f").symlink_to("old/deep")
        os.setxattr(tmp_path / name / "there", "system.posix_acl_default", DEFAULT_ACL)
    shutil.copytree(tmp_path / "lower/0/there", tmp_path / "lower/0/gone")
    (tmp_path / "lower/1").mkdir()
    os.mknod(tmp_path / "lower/1/gone", stat.S_IFCHR, 0)
    again = tar.Entry("sub/f", tar.FILE, 0o4750, mtime_ns=4)
    entries = (
        tar.Entry("", tar.DIRECTORY, 0o755),
        tar.Entry("f", tar.FILE, 0o600, mtime_ns=1),
        tar.Entry("old", tar.DIRECTORY, 0o2775),
        tar.Entry("old/deep", tar.FILE, 0o644),
        tar.Entry("sub", tar.DIRECTORY, 0o1777, mtime_ns=2),
        tar.Entry("sub/l", tar.SYMLINK, mtime_ns=3, linkname="../old"),
        tar.Entry("sub/f", tar.FILE, 0o444),
        tar.Entry("sub/g", tar.HARDLINK, linkname="sub/f"),
        tar.Entry("sub/p", tar.FIFO, 0o622),
        again,
        tar.Entry("sub/l/through", tar.FILE, 0o666),
        tar.Entry("sub/l", tar.FILE, 0o640),
        tar.Entry("more/deep/f", tar.FILE, 0o640),
    )
    command = copy_command(target)
    with Root(str(tmp_path / "plain")) as plain:
        Copier(plain, Users(plain), command).copy(in_trees(*entries))
    entered = []

    def build() -> None:
        layers = Layers(str(tmp_path), str(tmp_path / "image"))

        def kept(path: str) -> int | None:
            if (descriptor := layers.kept(path)) is not None:
                entered.append(path)
            return descriptor

        with layers.step(1) as path, Root(path) as root:
            Copier(root, Users(root), command, kept).copy(in_trees(*entries))
            found.extend(described(Path(path)))

    found: list[tuple[object, ...]] = []
    privately(build)
    assert found == list(described(tmp_path / "plain"))
    inherits = target in ("/there/", "/link/")
    assert {"there", "there/sub", "there/sub/f"} <= {
        str(path) for path, *_, lists in found if lists
    } or not inherits
    assert set(direct) <= set(entered)


def described(root: Path) -> Iterator[tuple[object, ...]]:
    """All that a copy decides of each file, but for the time of what it was told no time of."""
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_text() if stat.S_ISREG(status.st_mode) else path.is_symlink() and path.readlink()
        time = status.st_mtime_ns if status.st_mtime_ns < 10 else None
        names = 1 if path.is_dir() else status.st_nlink  # an overlay does not count those of directories
        lists = [name for name in os.listxattr(path, follow_symlinks=False) if "acl" in name]
        values = {name: os.getxattr(path, name) for name in lists}
        yield str(path.relative_to(root)), status.st_mode, names, time, content, values
