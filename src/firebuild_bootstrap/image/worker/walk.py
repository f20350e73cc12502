"""Visiting every file of a tree, always in the same order."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from typing import Final, NamedTuple

from firebuild_bootstrap.guest.overlay import MARKS
from firebuild_bootstrap.image.worker.errors import TreeError

# Kept: what a running system needs. Not kept: labels and trusted.*, which belong to the building host, and an
# overlay's own marks.
_KEPT_XATTRS: Final = ("security.capability", "user.", "system.posix_acl_")


class Node(NamedTuple):
    """One file of a tree; `path` is relative to the tree (empty for its root), `parent` a descriptor."""

    path: str
    name: str
    parent: int
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        """The same for every hard link of one file."""
        return self.status.st_dev, self.status.st_ino

    def content(self) -> BufferedReader:
        """Open the content of a regular file for reading; the caller closes it."""
        return os.fdopen(self._open(), "rb")

    def link_text(self) -> str:
        """Return the text of a symbolic link."""
        return os.readlink(self.name, dir_fd=self.parent)

    def xattrs(self) -> dict[str, bytes]:
        """Return the extended attributes that belong to an image, by name."""
        if not (stat.S_ISREG(self.status.st_mode) or stat.S_ISDIR(self.status.st_mode)):
            return {}
        descriptor = self._open()
        try:
            names = sorted(filter(is_kept, os.listxattr(descriptor)))
            return {name: os.getxattr(descriptor, name) for name in names}
        except OSError:  # a file system without extended attributes
            return {}
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        return os.open(self.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.parent)


def is_kept(attribute: str) -> bool:
    """Tell whether an extended attribute belongs to an image, by its name."""
    return attribute.startswith(_KEPT_XATTRS) and not attribute.startswith(MARKS)


def walk(root: str) -> Iterator[Node]:
    """Yield the root and everything below: parents before children, names in byte order.

    Raises:
        TreeError: a directory can't be read.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack: list[tuple[int, str, Iterator[str]]] = [(top, "", iter(_names(top)))]
    try:
        yield Node("", ".", top, os.fstat(top))
        while stack:
            parent, path, names = stack[-1]
            name = next(names, None)
            if name is None:
                os.close(stack.pop()[0])
                continue
            node = Node(f"{path}{name}", name, parent, os.lstat(name, dir_fd=parent))
            yield node
            if stat.S_ISDIR(node.status.st_mode):
                child = _enter(node)
                stack.append((child, f"{node.path}/", iter(_names(child))))
    finally:
        for descriptor, _, _ in stack:
            os.close(descriptor)


def _names(directory: int) -> list[str]:
    return sorted(os.listdir(directory), key=os.fsencode)


def _enter(node: Node) -> int:
    try:
        return os.open(node.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=node.parent)
    except OSError as error:
        raise TreeError(f"/{node.path}: {error.strerror}") from error
