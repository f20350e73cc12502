"""Visiting every file of an ext4 image, in the order of `walk`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from typing import Final, NamedTuple

from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.extfs import ROOT_INODE, Ext4Image, Inode, device_of
from firebuild_bootstrap.image.worker.walk import is_kept

# mke2fs makes it anew in every file system; what e2fsck puts there is kept.
_LOST_AND_FOUND: Final = "lost+found"


class ImageStatus(NamedTuple):
    """What `os.stat_result` says of a file, as far as it is asked for."""

    st_mode: int
    st_uid: int
    st_gid: int
    st_size: int
    st_nlink: int
    st_mtime_ns: int
    st_rdev: int


class ImageNode(NamedTuple):
    """One file of an image; used like `walk.Node`."""

    path: str
    image: Ext4Image
    inode: Inode

    @property
    def status(self) -> ImageStatus:
        """What is known of it without opening it."""
        one = self.inode
        return ImageStatus(one.mode, one.uid, one.gid, one.size, one.links, one.mtime_ns, device_of(one))

    @property
    def identity(self) -> tuple[int, int]:
        """See `walk.Node`."""
        return 0, self.inode.number

    def content(self) -> BufferedReader:
        """See `walk.Node`."""
        return self.image.content(self.inode)

    def link_text(self) -> str:
        """See `walk.Node`."""
        return os.fsdecode(self.image.link_text(self.inode))

    def xattrs(self) -> dict[str, bytes]:
        """See `walk.Node`."""
        if not (stat.S_ISREG(self.inode.mode) or stat.S_ISDIR(self.inode.mode)):
            return {}
        return {name: value for name, value in sorted(self.image.xattrs(self.inode).items()) if is_kept(name)}


def walk_image(image: Ext4Image) -> Iterator[ImageNode]:
    """Yield the root and everything below: parents before children, names in byte order.

    Raises:
        TreeError: the image is damaged.
    """
    root = image.inode(ROOT_INODE)
    if not stat.S_ISDIR(root.mode):
        raise TreeError(f"{image.path} cannot be read as ext4: its root is no directory")
    yield ImageNode("", image, root)
    seen = {ROOT_INODE}
    stack = [("", iter(_entries(image, root)))]
    while stack:
        above, entries = stack[-1]
        name, number = next(entries, (b"", 0))
        if not number:
            stack.pop()
            continue
        node = ImageNode(f"{above}{os.fsdecode(name)}", image, image.inode(number))
        if not stat.S_ISDIR(node.inode.mode):
            yield node
            continue
        if number in seen:
            raise TreeError(f"{image.path} cannot be read as ext4: the directory /{node.path} is there twice")
        seen.add(number)
        below = _entries(image, node.inode)
        if node.path == _LOST_AND_FOUND and not below:
            continue
        yield node
        stack.append((f"{node.path}/", iter(below)))


def _entries(image: Ext4Image, directory: Inode) -> list[tuple[bytes, int]]:
    return sorted(image.entries(directory))
