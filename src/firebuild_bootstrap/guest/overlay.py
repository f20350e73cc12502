"""The image's root as an overlay of layers: what a step changes becomes a directory of its own.

An overlay can be mounted in a user namespace since Linux 5.11; it keeps its marks in `user.overlay.*`
attributes then, because `trusted.*` belongs to the machine's own root
(Documentation/filesystems/overlayfs.rst). Renaming a directory of a lower layer fails with EXDEV, as in every
container.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from firebuild_bootstrap.layers.apply import UnpackReport, apply
from firebuild_bootstrap.layers.root import ResolvedPath, Root, remove_directory
from firebuild_bootstrap.layers.tar import LayerError, Sink, write_layer
from firebuild_bootstrap.layers.tree import (
    MAX_LAYERS,
    OVERLAY_MARKS,
    UNMOUNTABLE,
    Files,
    TreeSource,
    attribute_names,
    check_names,
    tree_entries,
    upper_entries,
)

from . import kernel

# Redirects and shared inodes tie a layer to those below; ours have to stand for themselves.
_OPTIONS = "index=off,metacopy=off,redirect_dir=nofollow"
_OPAQUE = frozenset(f"{mark}opaque" for mark in OVERLAY_MARKS)
_NOT_KEPT = ("security.", *OVERLAY_MARKS)
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV
_MAX_COMPARED = 1 << 20
_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def mount_layers(directory: str, names: Sequence[str], target: str, upper: str = "", work: str = "") -> None:
    """Mount the overlay of the layers `names` on `target`, read-only without `upper`.

    Args:
        directory: all names are relative to it, because mount(2) takes 4096 bytes of options.
        names: two directories at least, the lowest first; no name holds a colon or comma.
        target: an absolute path.
        upper: takes what is changed.
        work: an empty directory beside `upper`, which belongs to the kernel from now on.

    Raises:
        OSError: the kernel or the file system allows none, or there are more than `MAX_LAYERS`.
    """
    if len(names) > MAX_LAYERS:
        raise OSError(errno.E2BIG, f"{len(names)} layers, and {MAX_LAYERS} at most can be mounted")
    with _inside(directory):
        if any(UNMOUNTABLE in attribute_names(name) for name in names):
            raise OSError(errno.EOPNOTSUPP, "a layer was made where no overlay can be")
        if upper:
            # Nobody needs this root after a crash of the machine, and unmounting would write the whole disk.
            _mount(names, target, 0, f",volatile,upperdir={upper},workdir={work}")
        else:
            _mount(names, target, kernel.MS_RDONLY)


def _mount(names: Sequence[str], target: str, flags: int, more: str = "") -> None:
    kind = "" if own_mark() == OVERLAY_MARKS[0] else "userxattr,"
    data = f"{kind}{_OPTIONS},lowerdir={':'.join(reversed(names))}{more}"
    kernel.mount("overlay", target, "overlay", _FLAGS | flags, data)


def own_mark() -> str:
    """Return what the names of the notes begin with that the kernel makes for an overlay of this process."""
    return OVERLAY_MARKS[0 if kernel.in_initial_user_namespace() else 1]


def changes(upper: str, newest: int | None = None) -> Files:
    """Yield what a layer changes that an overlay of this user namespace has made; see `upper_entries`."""
    return upper_entries(upper, newest=newest, marks=(own_mark(),))


def flatten(trees: Sequence[str], target: str, *, newest: int | None = None) -> UnpackReport:
    """Copy the merged view of layers into an empty directory, without a mount: their number does not matter.

    Args:
        trees: the lowest first, which is a whole tree.
        target: the directory.
        newest: see `tree_entries`.

    Returns:
        what could not be kept of the uppermost.

    Raises:
        LayerError, OSError: one can't be read, or the directory not be written.
    """
    report = UnpackReport()
    devices = kernel.in_initial_user_namespace()
    with Root(target) as root:
        for number, tree in enumerate(trees):
            files = changes(tree, newest=newest) if number else tree_entries(tree, newest=newest)
            report = apply(TreeSource(files, whiteouts=number > 0), root, devices=devices)
    return report


@contextmanager
def _inside(directory: str) -> Iterator[None]:
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(directory)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


class Layers:
    """The layers of one build, in a directory on one file system:

        lower/<n>/           what the image starts from, 0 the lowest; nobody writes there
        between/<step>/      what a step would make that need not be executed, before all later steps
        upper/<step>/fs/     what a finished step has changed
        unfinished/fs/       what the step at work changes, or one that failed has changed
        folded/<step>/       all that was below this step, merged, because it was too much for one mount
        work/                the kernel's own

    Args:
        directory: that directory.
        target: where the root is mounted while a step is at work; it is made if it is missing.
    """

    def __init__(self, directory: str, target: str) -> None:
        self._directory = directory
        self._target = target
        self._borrowed: list[str] = []
        self._before: dict[str, Known] = {}
        self.notice = ""
        """What the user should know, for the first step to say."""
        self._names = [f"lower/{name}" for name in _numbers(f"{directory}/lower")]
        self._between = _numbers(f"{directory}/between")
        for path in (target, f"{directory}/upper", f"{directory}/work"):
            os.makedirs(path, exist_ok=True)

    @contextmanager
    def step(self, number: int, *, linked: bool = False) -> Iterator[str]:
        """Have the root mounted for the length of the block; at its end the layer `number` is finished.

        Where the block raises, the layer stays unfinished, and there can be no other.

        Args:
            number: of the step.
            linked: the layer is made apart, in an empty directory, and lies on the others afterwards.

        Yields:
            the root, or that directory.

        Raises:
            OSError: the root can't be mounted.
            LayerError: the block has made what no layer can hold.
        """
        fs, work = "unfinished/fs", f"work/{number}"
        self._borrowed.clear()
        self._before.clear()
        while self._between and self._between[0] < number:
            self._names.append(f"between/{self._between.pop(0)}")
        if linked:
            # No overlay: on one, even of nothing, new directories would hide those of the layers below.
            yield self._apart()
            self._finish(number)
            return
        for name in (fs, work):
            os.makedirs(f"{self._directory}/{name}")
        if len(self._names) > MAX_LAYERS:
            self._fold(number)
        resemble(f"{self._directory}/{fs}", f"{self._directory}/{self._names[-1]}")
        mount_layers(self._directory, self._names, self._target, fs, work)
        try:
            for path in network_files():
                self.borrow(path)
            yield self._target
        finally:
            _unmount(self._target)
        with suppress(OSError):  # a RUN may have given it to its root
            os.removexattr(f"{self._directory}/{fs}", UNMOUNTABLE)
        with Root(f"{self._directory}/{fs}") as upper:
            for path in self._borrowed:
                _forget(upper, path, self._before)
        self._finish(number)

    def _fold(self, number: int) -> None:
        """Merge all layers so far into one tree: a copy, but one in `MAX_LAYERS` steps."""
        names, self._names = self._names, [f"folded/{number}"]
        os.makedirs(target := f"{self._directory}/{self._names[0]}")
        try:
            flatten([f"{self._directory}/{name}" for name in names], target)
        except LayerError as error:
            raise OSError(errno.EIO, error.message) from error
        if names[0].startswith("folded/"):
            with Root(f"{self._directory}/folded") as root:
                remove_directory(names[0].rpartition("/")[2], root.descriptor)

    def _apart(self) -> str:
        """Make the directory of a layer, for what is made apart."""
        path = f"{self._directory}/unfinished/fs"
        os.makedirs(path)
        os.chmod(path, 0o755)  # noqa: S103 - a root directory's, whatever the umask
        return path

    def _finish(self, number: int) -> None:
        check_names(f"{self._directory}/unfinished/fs")
        os.rename(f"{self._directory}/unfinished", f"{self._directory}/upper/{number}")
        self._names.append(f"upper/{number}/fs")

    def kept(self, path: str) -> int | None:
        """Open the directory where the layer of the step at work keeps what it has of the directory `path`.

        Returns:
            its descriptor, which the caller closes; None where links lead to `path`, or the layer has nothing
            of it. Where the step itself has made the directory, all of it is there.
        """
        descriptor = os.open(f"{self._directory}/unfinished/fs", _ENTER)
        for name in path.strip("/").split("/"):
            above = descriptor
            try:
                descriptor = os.open(name, _ENTER, dir_fd=above)
            except OSError:
                return None
            finally:
                os.close(above)
        return descriptor

    def write(self, step: int, out: Sink) -> None:
        """Write the layer of a finished step as an archive.

        Raises:
            LayerError: it can't be one.
            OSError: it can't be read.
        """
        write_layer(out, changes(f"{self._directory}/upper/{step}/fs"))

    def borrow(self, path: str) -> None:
        """Take note, while a step is at work, of what is moved or made for a RUN and put right again.

        The overlay copies it into the layer all the same, with the directories above it; what is at the end
        as it is now is taken out.
        """
        self._borrowed.append(path)
        note(self._target, path, self._before)


def _numbers(directory: str) -> list[int]:
    return sorted(map(int, os.listdir(directory))) if os.path.isdir(directory) else []


def network_files() -> tuple[str, ...]:
    """Return what a RUN sees of the machine around it in the place of the image's own."""
    from .netfiles import NETWORK_FILES  # here, because workers mount layers, too, and do without it

    return NETWORK_FILES


def note(target: str, path: str, before: dict[str, Known]) -> None:
    """Describe `path` of the image `target`, and the directories above it, in `before`."""
    with Root(target) as root:
        while path != "/" and path not in before:
            with suppress(OSError), root.locate(path, follow=False) as place:
                if (found := describe(place)) is not None:
                    before[path] = found
            path = os.path.dirname(path)


def _unmount(target: str) -> None:
    try:
        kernel.unmount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        kernel.detach(target)


def resemble(new: str, model: str) -> None:
    """Give a layer's root what the root has so far: the uppermost layer's counts."""
    found = os.stat(model)
    os.chown(new, found.st_uid, found.st_gid)
    os.chmod(new, stat.S_IMODE(found.st_mode))
    for name, value in _attributes(model).items():
        os.setxattr(new, name, value)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))


def _attributes(path: str | int) -> dict[str, bytes]:
    """Return the extended attributes that are neither the overlay's nor labels of the machine around."""
    names = sorted(name for name in attribute_names(path) if not name.startswith(_NOT_KEPT))
    return {name: os.getxattr(path, name) for name in names}


class Known(NamedTuple):
    """A file or directory: all that tells whether it has changed; its path has no links in it."""

    path: str
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    attributes: dict[str, bytes]


def _forget(upper: Root, path: str, before: dict[str, Known]) -> None:
    """Remove `path` from a layer where it is as it was, and then the directories above it likewise."""
    while path != "/":
        try:
            with upper.locate(path, follow=False) as place:
                # A link on the way is another one in the layer alone, if it is there at all.
                if place.status() is not None:
                    found = describe(place)
                    if found is None or found != before.get(path):
                        return
                _remove_quietly(place)
        except FileNotFoundError:  # its directory may still be as it was
            pass
        except OSError:  # the directory holds something else, or is none any more
            return
        path = os.path.dirname(path)


def describe(place: ResolvedPath) -> Known | None:
    """Describe what is there; None for what can't be compared, which is a change therefore."""
    found = place.status()
    if found is None:
        return None
    status = (found.st_mode, (found.st_uid, found.st_gid), found.st_mtime_ns)
    if stat.S_ISLNK(found.st_mode):
        text = os.readlink(place.name, dir_fd=place.directory)
        return Known(place.path, *status, os.fsencode(text), {})
    is_file = stat.S_ISREG(found.st_mode)
    if not (is_file or stat.S_ISDIR(found.st_mode)) or (is_file and found.st_size > _MAX_COMPARED):
        return None
    descriptor = place.open(os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not _OPAQUE.isdisjoint(attribute_names(descriptor)):
            return None
        content = os.read(descriptor, _MAX_COMPARED) if is_file else b""
        return Known(place.path, *status, content, _attributes(descriptor))
    finally:
        os.close(descriptor)


def _remove_quietly(place: ResolvedPath) -> None:
    """Remove a name without a trace in its directory's times, which belong to the image."""
    times = os.stat(".", dir_fd=place.directory)
    found = place.status()
    if found is not None and stat.S_ISDIR(found.st_mode):
        os.rmdir(place.name, dir_fd=place.directory)
    else:
        os.unlink(place.name, dir_fd=place.directory)
    os.utime(".", ns=(times.st_atime_ns, times.st_mtime_ns), dir_fd=place.directory)
