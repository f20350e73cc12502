"""The directory of the build context, entered through descriptors so that no link leads out of it."""

from __future__ import annotations

import os
import stat
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from firebuild_bootstrap.context.entries import attributes_of
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers.tar import Regions
from firebuild_pki.values import dataclass

# As many links as Linux follows for one path (path_resolution(7)).
_MAX_LINKS: Final = 40
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD: Final = 128  # directories that are open at once, however deep a tree is
# O_NONBLOCK: a FIFO put in the place of a file must not block the build.
_CONTENT: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Parts = tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """Something in the build context: its path without links, and its status."""

    parts: Parts
    status: os.stat_result

    @property
    def path(self) -> str:
        """The path below the context, with `/` between names."""
        return "/".join(self.parts)

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.status.st_mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.status.st_mode)


class FileRoot(ABC):
    """A tree of files that COPY may take from; `/` between names, no link leads out of it."""

    on_disk = False
    """Whether its files are those of a directory, with descriptors."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the tree; may be called again."""

    @abstractmethod
    def node(self, parts: Sequence[str]) -> Node:
        """Look at `parts` without following links.

        Raises:
            OSError: it does not exist, or something on the way is not a directory.
        """

    @abstractmethod
    def read_link(self, parts: Sequence[str]) -> str:
        """Return the text of the symbolic link at `parts`.

        Raises:
            OSError: there is no link any more.
        """

    @abstractmethod
    def children(self, parts: Sequence[str]) -> list[Node]:
        """Return what the directory `parts` holds, sorted by name.

        Raises:
            OSError: it can't be read.
        """

    @abstractmethod
    def open(self, parts: Sequence[str]) -> BinaryIO:
        """Open the regular file at `parts` for unbuffered reading, following no link.

        Raises:
            OSError: it is gone, is not a regular file any more, or can't be read.
        """

    @abstractmethod
    def attributes(self, parts: Sequence[str]) -> Mapping[str, bytes]:
        """Return the extended attributes of the file or directory at `parts` that belong into an image.

        Raises:
            OSError: it is gone, or can't be read.
        """

    def regions(self, _parts: Sequence[str], /) -> Regions | None:
        """Return where the regular file at `parts` of an archive has data.

        None where it has no holes, and where the file itself knows them.
        """
        return None

    def stored(self, _parts: Sequence[str], /) -> Iterator[bytes]:
        """Yield the data of `regions`, in pieces of at most a megabyte.

        Raises:
            OSError: it can't be read.
        """
        return iter(())

    @contextmanager
    def walking(self) -> Iterator[FileRoot]:
        """Give the tree to one walk, which may keep open what its neighbours need, too."""
        yield self

    def resolve(self, parts: Sequence[str], allowed: Callable[[str], bool]) -> Node:
        """Follow links, with this tree as the root directory of all of them.

        Args:
            parts: the names of the path; `..` stops at its root.
            allowed: whether the link with that path may be used.

        Raises:
            OSError: something on the way does not exist, is not allowed, or links go round in circles.
        """
        ahead = deque(parts)
        node = self.node(())
        links = 0
        while ahead:
            name = ahead.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                node = self.node(node.parts[:-1])
                continue
            below = self.node((*node.parts, name))
            if not below.is_link:
                node = below
                continue
            links += 1
            if links > _MAX_LINKS or not allowed(below.path):
                raise FileNotFoundError(below.path)
            target = self.read_link(below.parts)
            node = self.node(()) if target.startswith("/") else node
            ahead.extendleft(reversed(target.split("/")))
        return node


class ContextRoot(FileRoot):
    """Access to everything below one directory, whatever links are in it and however they change.

    Raises:
        InputError: `path` is not a directory or can't be entered.
    """

    on_disk = True

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(
                f"build context {path}: expected a directory: {error.strerror}",
                hint="name an existing directory as the build context",
            ) from error
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    def close(self) -> None:
        """Let go of the directory; may be called again."""
        self._close()

    @contextmanager
    def _directory(self, parts: Sequence[str]) -> Iterator[int]:
        current = os.open(".", _DIRECTORY, dir_fd=self._descriptor)
        try:
            for name in parts:
                below = os.open(name, _DIRECTORY, dir_fd=current)
                os.close(current)
                current = below
            yield current
        finally:
            os.close(current)

    def node(self, parts: Sequence[str]) -> Node:
        """Look at `parts` without following links.

        Raises:
            OSError: it does not exist, or something on the way is not a directory.
        """
        parts = tuple(parts)
        with self._directory(parts[:-1]) as parent:
            name = parts[-1] if parts else "."
            return Node(parts, os.stat(name, dir_fd=parent, follow_symlinks=False))

    def read_link(self, parts: Sequence[str]) -> str:
        """Return the text of the symbolic link at `parts`.

        Raises:
            OSError: there is no link any more.
        """
        with self._directory(parts[:-1]) as parent:
            return os.readlink(parts[-1], dir_fd=parent)

    def children(self, parts: Sequence[str]) -> list[Node]:
        """Return what the directory `parts` holds, sorted by name.

        Raises:
            OSError: it can't be read.
        """
        with self._directory(parts) as directory:
            # A descriptor that only names a place (O_PATH) can't be listed; this one can.
            readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
            try:
                names = sorted(os.listdir(readable))
            finally:
                os.close(readable)
            return [
                Node((*parts, name), os.stat(name, dir_fd=directory, follow_symlinks=False)) for name in names
            ]

    def open(self, parts: Sequence[str]) -> BinaryIO:
        """Open the regular file at `parts` for unbuffered reading, following no link.

        Raises:
            OSError: it is gone, is not a regular file any more, or can't be read.
        """
        return os.fdopen(self.descriptor(parts), "rb", buffering=0)

    def descriptor(self, parts: Sequence[str]) -> int:
        """Open the regular file at `parts` for reading, following no link; the caller closes it.

        Raises:
            OSError: it is gone, is not a regular file any more, or can't be read.
        """
        with self._directory(parts[:-1]) as parent:
            descriptor = os.open(parts[-1], _CONTENT, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("it is not a regular file any more")
        return descriptor

    def attributes(self, parts: Sequence[str]) -> Mapping[str, bytes]:
        """Return the extended attributes of the file or directory at `parts`; see `FileRoot.attributes`."""
        with self._directory(parts[:-1]) as parent:
            descriptor = os.open(parts[-1] if parts else ".", _CONTENT, dir_fd=parent)
        try:
            return attributes_of(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def walking(self) -> Iterator[FileRoot]:
        """Give the directory to one walk, whose neighbours share their way."""
        walked = _WalkedRoot(self.path, self._descriptor)
        try:
            yield walked
        finally:
            walked.close()


class _WalkedRoot(ContextRoot):
    """The context as one walk sees it, which keeps the directories open on the way to where it stands.

    Without that, a file costs as many system calls as its path has names, and a deep tree quadratic time.
    It goes on working after it has been closed, from the top then. One thread uses it at a time.
    """

    def __init__(self, path: Path, top: int) -> None:
        self.path = path
        self._descriptor = top
        self._way: Parts = ()
        self._open: dict[int, int] = {}  # descriptors of the directories on the way, by their depth from 1
        self._walks = True

    def close(self) -> None:
        """Let go of the directories."""
        self._walks = False
        self._forget(0)

    @contextmanager
    def _directory(self, parts: Sequence[str]) -> Iterator[int]:
        if not self._walks:
            with super()._directory(parts) as descriptor:
                yield descriptor
            return
        yield self._enter(tuple(parts))

    def _enter(self, parts: Parts) -> int:
        if parts != self._way:
            same = min(len(parts), len(self._way))
            while parts[:same] != self._way[:same]:
                same -= 1
            self._forget(same)
            self._way = parts
        depth = len(parts)
        if not depth:
            return self._descriptor
        # Those far above were closed; when the walk comes back to them the whole way there is walked again.
        known = depth if depth in self._open else max(self._open, default=0)
        for level in range(known, depth):
            above = self._open[level] if level else self._descriptor
            try:
                self._open[level + 1] = os.open(parts[level], _DIRECTORY, dir_fd=above)
            except OSError:
                self._way = parts[:level]
                raise
            if level - _HELD in self._open:
                os.close(self._open.pop(level - _HELD))
        return self._open[depth]

    def _forget(self, depth: int) -> None:
        """Close what is deeper than `depth`."""
        for level in [level for level in self._open if level > depth]:
            os.close(self._open.pop(level))
