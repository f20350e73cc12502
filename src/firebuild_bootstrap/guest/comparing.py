"""Layers where no overlay can be mounted: what a step has changed shows in two listings of the image.

Any change of a file gives it a new ctime, which nobody can set (inode(7)): what has the inode, ctime and the
rest of before is as before. No content is read for that. What has changed is copied, so that a step's layer
is the same kind of directory that an overlay leaves. One thing differs: a file with several names stays one
file when it is changed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress

from firebuild_bootstrap.layers.apply import apply
from firebuild_bootstrap.layers.root import ResolvedPath, Root
from firebuild_bootstrap.layers.tar import LayerError
from firebuild_bootstrap.layers.tree import (
    UNMOUNTABLE,
    WHITEOUT_MARK,
    TreeSource,
    statuses,
    tree_entries,
)

from .errors import StepError
from .overlay import Known, Layers, describe, network_files, note
from .provide import lay_on

_RECENT_NS = 10 * 10**9
_PAUSE = 0.001
_PATIENCE = 5.0  # the coarsest file systems count two seconds

Listing = dict[str, int]
"""Of each path something that is another number when the file is another one; odd for directories."""


class Comparing(Layers):
    """The layers of steps that work on one plain tree.

        base/                what the image starts from, where it is not there yet; nobody writes there
        between/<step>/      as `Layers` has it
        upper/<step>/fs/     what a finished step has changed
        unfinished/fs/       made at the end of a step

    Args:
        directory: where that is; not in the image.
        target: the image.

    Raises:
        OSError: the file system takes nothing that could mean that a file was removed.
        StepError: the image does not fit beside its base.
    """

    def __init__(self, directory: str, target: str) -> None:
        super().__init__(directory, target)
        self._listing: Listing | None = None
        self._nodes = can_make_nodes(directory)
        if os.path.isdir(f"{directory}/base"):
            self._fill(f"{directory}/base")

    def _fill(self, base: str) -> None:
        began = time.monotonic()
        try:
            with Root(self._target) as root:
                apply(TreeSource(tree_entries(base)), root, devices=True)
        except (OSError, LayerError) as error:
            reason = error.message if isinstance(error, LayerError) else error.strerror or str(error)
            raise StepError(f"what the image starts from can't be copied to the drive: {reason}") from error
        self.notice = (
            f"the kernel {os.uname().release} has no overlay file system (CONFIG_OVERLAY_FS): what the image "
            f"starts from was copied, in {time.monotonic() - began:.1f} s, and what steps change is found by "
            "comparing"
        )

    @contextmanager
    def step(self, number: int, *, linked: bool = False) -> Iterator[str]:
        """Take note of what the block changes; at its end the layer `number` is finished.

        Where the block raises there is no layer, and there can be no other.

        Args:
            number: of the step.
            linked: as `Layers.step` has it; what is made apart is copied into the image then.

        Yields:
            the image, or the directory for that.

        Raises:
            OSError: the image can't be read, or a layer not be written.
            LayerError: the block has made what no layer can hold.
        """
        while self._between and self._between[0] < number:
            lay_on(f"{self._directory}/between/{self._between.pop(0)}", self._target)
            self._listing = None
        if linked:
            path = self._apart()
            yield path
            lay_on(path, self._target)
            self._finish(number)
            self._listing = None
            return
        self._listing = self._look() if self._listing is None else self._listing
        self._before.clear()
        for path in network_files():
            self.borrow(path)
        yield self._target
        after = self._look()
        self._write(number, self._listing, after)
        self._listing = after

    def borrow(self, path: str) -> None:
        """Take note, while a step is at work, of what is moved or made for a RUN and put right again."""
        note(self._target, path, self._before)

    def kept(self, _path: str) -> int | None:
        """Return None: a step works on the image itself, and its layer is made afterwards."""
        return None

    def _look(self) -> Listing:
        """List the image, and wait until whatever happens from now on gives another ctime.

        A file that changes twice within one tick of the clock has the same ctime after both; git calls such
        entries of its index racily clean.
        """
        began = time.time_ns()
        listing: Listing = {}
        recent: set[int] = set()
        for path, found in statuses(self._target):
            is_directory = stat.S_ISDIR(found.st_mode)
            identity = (found.st_dev, found.st_ino, found.st_mode, found.st_uid, found.st_gid, found.st_rdev)
            times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            listing[path] = hash((*identity, *times)) << 1 | is_directory
            if found.st_ctime_ns > began - _RECENT_NS:
                recent.add(found.st_ctime_ns)
        self._await_tick(recent)
        return listing

    def _await_tick(self, recent: Container[int]) -> None:
        end = time.monotonic() + _PATIENCE
        descriptor = self._unseen_file()
        try:
            while time.monotonic() < end:
                os.utime(descriptor)
                if os.fstat(descriptor).st_ctime_ns not in recent:
                    return
                time.sleep(_PAUSE)
        finally:
            os.close(descriptor)

    def _unseen_file(self) -> int:
        """Open a new file without a name, on the image's file system if that can do it."""
        with suppress(OSError):
            return os.open(self._target, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        path = f"{self._directory}/tick"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return descriptor

    def _write(self, number: int, before: Listing, after: Listing) -> None:
        changed = {path for path, identity in after.items() if before.get(path) != identity}
        with Root(self._target) as root:
            borrowed = {each.path.strip("/"): each for each in self._before.values()}
            same = {path for path, each in borrowed.items() if path in changed and _same(root, each)}
            # Their other names have changed as little.
            files = {root.status(f"/{path}", follow=False) for path in same}
            inodes = {(each.st_dev, each.st_ino) for each in files if each is not None and each.st_nlink > 1}
            changed -= same
            if inodes:
                changed = {path for path in changed if _inode(root, path) not in inodes}
        gone = [path for path in before if path not in after and after.get(_above(path), 0) & 1]
        wanted = {""}
        for path in (*changed, *map(_above, gone)):
            while path not in wanted:
                wanted.add(path)
                path = _above(path)  # noqa: PLW2901 - the way up
        fs = self._apart()
        with Root(fs) as layer:
            for path in gone:
                with layer.locate(path, follow=False, parents=(0, 0)) as place:
                    _whiteout(place, node=self._nodes)
            apply(TreeSource(tree_entries(self._target, only=wanted)), layer, devices=True)
        if not self._nodes:
            os.setxattr(fs, UNMOUNTABLE, b"y")
        self._finish(number)


def can_make_nodes(directory: str) -> bool:
    """Whether layers in `directory` can say as overlays do that a file was removed; else they take a mark.

    Raises:
        OSError: the file system takes neither.
    """
    trial = f"{directory}/trial"
    os.makedirs(trial)
    try:
        with Root(trial) as root:
            # Overlays refuse the node (EPERM); fuse-overlayfs takes it for its own (ENOENT).
            with suppress(OSError), root.locate("node", follow=False) as place:
                _whiteout(place, node=True)
                found = place.status()
                if found is not None and stat.S_ISCHR(found.st_mode):
                    return True
            with root.locate("mark", follow=False) as place:
                _whiteout(place, node=False)
            return False
    finally:
        # fuse-overlayfs 1.10 lists no file after the refusal, and until then counts the node as one.
        for name in ("node", "mark"):
            with suppress(FileNotFoundError):
                os.unlink(f"{trial}/{name}")
        os.listdir(trial)
        os.rmdir(trial)


def _whiteout(place: ResolvedPath, *, node: bool) -> None:
    if node:
        # What the kernel takes for "removed" in an overlay. Everybody may make it, but not on an overlay.
        os.mknod(place.name, stat.S_IFCHR, 0, dir_fd=place.directory)
        return
    descriptor = place.open(os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        os.setxattr(descriptor, WHITEOUT_MARK, b"y")
    finally:
        os.close(descriptor)


def _same(root: Root, before: Known) -> bool:
    with suppress(OSError), root.locate(before.path, follow=False) as place:
        return describe(place) == before
    return False


def _inode(root: Root, path: str) -> tuple[int, int] | None:
    found = root.status(f"/{path}", follow=False)
    return (found.st_dev, found.st_ino) if found is not None and not stat.S_ISDIR(found.st_mode) else None


def _above(path: str) -> str:
    return path.rpartition("/")[0]
