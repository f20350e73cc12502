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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from firebuild_bootstrap.layers.root import Place, Root
from firebuild_bootstrap.layers.tree import OVERLAY_MARKS

from . import kernel
from .netfiles import NETWORK_FILES

MAX_LAYERS = 480

# Redirects and shared inodes tie a layer to those below; ours have to stand for themselves.
_OPTIONS = "index=off,metacopy=off,redirect_dir=nofollow"
_OPAQUE = tuple(f"{mark}opaque" for mark in OVERLAY_MARKS)
# mount(2) takes one page of options, and each name has up to 10 bytes; the kernel takes 500 layers.
_NOT_KEPT = ("security.", *OVERLAY_MARKS)
_AT_ONCE = 240
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV
_MAX_COMPARED = 1 << 20


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
        if len(names) > _AT_ONCE:
            # The kernel stacks overlays two deep. The lowest stay the same from step to step.
            if not os.path.isdir("folded"):
                os.mkdir("folded", 0o700)
                _mount(names[:_AT_ONCE], "folded", kernel.MS_RDONLY)
            names = ["folded", *names[_AT_ONCE:]]
        if upper:
            # Nobody needs this root after a crash of the machine, and unmounting would write the whole disk.
            _mount(names, target, 0, f",volatile,upperdir={upper},workdir={work}")
        else:
            _mount(names, target, kernel.MS_RDONLY)


def _mount(names: Sequence[str], target: str, flags: int, more: str = "") -> None:
    marks = "" if kernel.in_initial_user_namespace() else "userxattr,"
    data = f"{marks}{_OPTIONS},lowerdir={':'.join(reversed(names))}{more}"
    kernel.mount("overlay", target, "overlay", _FLAGS | flags, data)


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
        upper/<step>/fs/     what a finished step has changed
        unfinished/fs/       what the step at work changes, or one that failed has changed
        work/                the kernel's own

    Args:
        directory: that directory.
        target: where the root is mounted while a step is at work; it is made if it is missing.

    `touched` takes, while a step is at work, paths of what may be as it was before at its end: the overlay
    has copied it into the layer all the same.
    """

    def __init__(self, directory: str, target: str) -> None:
        self._directory = directory
        self._target = target
        self.touched: list[str] = []
        self._names = [f"lower/{name}" for name in sorted(os.listdir(f"{directory}/lower"), key=int)]
        for path in (target, f"{directory}/upper", f"{directory}/work"):
            os.makedirs(path, exist_ok=True)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Have the root mounted for the length of the block; at its end the layer `number` is finished.

        Where the block raises, the layer stays unfinished, and there can be no other.

        Raises:
            OSError: the root can't be mounted.
        """
        fs, work = "unfinished/fs", f"work/{number}"
        self.touched.clear()
        for name in (fs, work):
            os.makedirs(f"{self._directory}/{name}")
        _resemble(f"{self._directory}/{fs}", f"{self._directory}/{self._names[-1]}")
        mount_layers(self._directory, self._names, self._target, fs, work)
        try:
            yield
        finally:
            _unmount(self._target)
        self._forget_unchanged(f"{self._directory}/{fs}")
        os.rename(f"{self._directory}/unfinished", f"{self._directory}/upper/{number}")
        self._names.append(f"upper/{number}/fs")

    def _forget_unchanged(self, fs: str) -> None:
        """Take out of a layer what was moved away or mounted on for a RUN, and is as it was."""
        touched = (*NETWORK_FILES, *self.touched)
        if len(self._names) < 2:  # nothing is below, and the kernel wants two directories at least
            return
        with Root(fs) as upper:
            if not any(upper.status(path, follow=False) for path in touched):
                return
        mount_layers(self._directory, self._names, self._target)
        try:
            with Root(fs) as upper, Root(self._target) as lower:
                for path in touched:
                    _forget(upper, lower, path)
        finally:
            _unmount(self._target)


def _unmount(target: str) -> None:
    try:
        kernel.unmount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        kernel.detach(target)


def _resemble(new: str, model: str) -> None:
    """Give a layer's root what the root has so far: the uppermost layer's counts."""
    found = os.stat(model)
    os.chown(new, found.st_uid, found.st_gid)
    os.chmod(new, stat.S_IMODE(found.st_mode))
    for name, value in _attributes(model):
        os.setxattr(new, name, value)
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))


def _attributes(path: str | int) -> list[tuple[str, bytes]]:
    """Return the extended attributes that are not the overlay's, and no labels of the machine around."""
    with suppress(OSError):  # a file system without
        names = sorted(name for name in os.listxattr(path) if not name.startswith(_NOT_KEPT))
        return [(name, os.getxattr(path, name)) for name in names]
    return []


def _forget(upper: Root, lower: Root, path: str) -> None:
    """Remove `path` from the layer where it is the same below, and then the directories above it likewise."""
    while path != "/":
        try:
            with upper.locate(path, follow=False) as ours, lower.locate(path, follow=False) as theirs:
                # The layer alone may lack a link on the way, or have another one.
                if ours.path != theirs.path or not _same(ours, theirs):
                    return
                _remove_quietly(ours)
        except OSError:  # not in the layer, not below, or a directory that holds something
            return
        path = os.path.dirname(path)


def _remove_quietly(place: Place) -> None:
    """Remove a name without a trace in its directory's times, which belong to the image."""
    times = os.stat(".", dir_fd=place.directory)
    found = place.status()
    if found is not None and stat.S_ISDIR(found.st_mode):
        os.rmdir(place.name, dir_fd=place.directory)
    else:
        os.unlink(place.name, dir_fd=place.directory)
    os.utime(".", ns=(times.st_atime_ns, times.st_mtime_ns), dir_fd=place.directory)


def _same(ours: Place, theirs: Place) -> bool:
    first, second = ours.status(), theirs.status()
    if first is None or second is None or _summary(first) != _summary(second):
        return False
    if stat.S_ISLNK(first.st_mode):
        texts = [os.readlink(place.name, dir_fd=place.directory) for place in (ours, theirs)]
        return texts[0] == texts[1]
    if not (stat.S_ISDIR(first.st_mode) or stat.S_ISREG(first.st_mode)) or first.st_size > _MAX_COMPARED:
        return False
    contents = []
    for place in (ours, theirs):
        descriptor = place.open(os.O_RDONLY)
        try:
            is_opaque = place is ours and any(name in _OPAQUE for name in _names_of(descriptor))
            data = os.read(descriptor, _MAX_COMPARED) if stat.S_ISREG(first.st_mode) else b""
            contents.append((is_opaque, _attributes(descriptor), data))
        finally:
            os.close(descriptor)
    return contents[0] == contents[1]


def _names_of(descriptor: int) -> Iterable[str]:
    try:
        return os.listxattr(descriptor)
    except OSError:
        return ()


def _summary(found: os.stat_result) -> tuple[int, ...]:
    size = found.st_size if stat.S_ISREG(found.st_mode) else 0
    return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, size
