"""The files of an ext4 image as entries, in the order of `tree_entries`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Final

from firebuild_bootstrap.image.worker.extfs import ROOT_INODE, Ext4Image, FileContent, Inode, device_of
from firebuild_bootstrap.layers.tar import DIRECTORY, FILE, HARDLINK, SYMLINK, Entry, LayerError, Regions
from firebuild_bootstrap.layers.tree import KINDS, Files, find_regions, is_kept

# Every new file system has one; what e2fsck puts there is kept.
_LOST_AND_FOUND: Final = "lost+found"


def image_entries(image: Ext4Image) -> Files:
    """Yield everything in an image as `tree_entries` does: sockets are left out.

    Raises:
        LayerError: the image is damaged.
    """
    first_names: dict[int, str] = {}
    for path, inode in walk_image(image):
        kind = KINDS.get(stat.S_IFMT(inode.mode))
        if kind is None:
            continue
        entry = Entry(path, kind, stat.S_IMODE(inode.mode), inode.uid, inode.gid, inode.mtime_ns)
        if kind != DIRECTORY and first_names.setdefault(inode.number, path) != path:
            yield entry._replace(kind=HARDLINK, linkname=first_names[inode.number]), b""
        elif kind == FILE:
            content = FileContent(image, inode)
            regions = find_regions(inode.size, content.data(), content.read_at)
            entry = entry._replace(size=inode.size, regions=regions, xattrs=_xattrs(image, inode))
            yield entry, _Stored(content, regions if regions is not None else ((0, inode.size),))
        elif kind == DIRECTORY:
            yield entry._replace(xattrs=_xattrs(image, inode)), b""
        elif kind == SYMLINK:
            yield entry._replace(linkname=os.fsdecode(image.link_text(inode))), b""
        else:
            device = device_of(inode)
            yield entry._replace(device=(os.major(device), os.minor(device))), b""


class _Stored:
    """What a file has in its regions, one after the other."""

    def __init__(self, content: FileContent, regions: Regions) -> None:
        self._content = content
        self._regions = [region for region in regions if region[1]]

    def read(self, size: int, /) -> bytes:
        if not self._regions:
            return b""
        offset, length = self._regions[0]
        data = self._content.read_at(min(size, length), offset)
        if len(data) == length:
            del self._regions[0]
        else:
            self._regions[0] = (offset + len(data), length - len(data))
        return data


def _xattrs(image: Ext4Image, inode: Inode) -> dict[str, bytes]:
    return {name: value for name, value in sorted(image.xattrs(inode).items()) if is_kept(name)}


def walk_image(image: Ext4Image) -> Iterator[tuple[str, Inode]]:
    """Yield path and inode of the root and everything below: parents before children, names in byte order.

    Raises:
        LayerError: the image is damaged.
    """
    root = image.inode(ROOT_INODE)
    if not stat.S_ISDIR(root.mode):
        raise LayerError(f"{image.path} cannot be read as ext4: its root is not a directory")
    yield "", root
    seen = {ROOT_INODE}
    stack = [("", iter(_entries(image, root)))]
    while stack:
        above, entries = stack[-1]
        name, number = next(entries, (b"", 0))
        if not number:
            stack.pop()
            continue
        path, inode = f"{above}{os.fsdecode(name)}", image.inode(number)
        if not stat.S_ISDIR(inode.mode):
            yield path, inode
            continue
        if number in seen:
            raise LayerError(f"{image.path} cannot be read as ext4: the directory /{path} is there twice")
        seen.add(number)
        below = _entries(image, inode)
        if path == _LOST_AND_FOUND and not below:
            continue
        yield path, inode
        stack.append((f"{path}/", iter(below)))


def _entries(image: Ext4Image, directory: Inode) -> list[tuple[bytes, int]]:
    return sorted(image.entries(directory))
