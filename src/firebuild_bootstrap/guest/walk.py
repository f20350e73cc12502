"""The walk from the image's root to a path, which no link can lead astray.

Every path is walked name by name with directory descriptors and O_NOFOLLOW. A symbolic link is read
and its text walked again inside the root, `..` goes back along the descriptors already held and never
above the root. So neither a planted link nor one that is swapped during the walk leads outside.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from types import TracebackType
from typing import NamedTuple

_MAX_LINKS = 40  # as in the kernel (path_resolution(7))
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Owner = tuple[int, int]


class Metadata(NamedTuple):
    """Owner (uid, gid), mode (0 to 0o7777, None: leave) and modification time (ns since 1970, None: now)."""

    owner: Owner = (0, 0)
    mode: int | None = None
    mtime_ns: int | None = None


class Place:
    """A name in a directory inside the root; owns the directory's descriptor.

    `directory` is its descriptor, `name` the last component ("." for the root itself), `path` the
    whole path with all links resolved.
    """

    def __init__(self, directory: int, name: str, path: str) -> None:
        self.directory = directory
        self.name = name
        self.path = path

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.directory)

    def status(self) -> os.stat_result | None:
        """Return what lies there, without following a link; None where nothing does."""
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open(self, flags: int) -> int:
        """Open what lies there and return the descriptor; a link is an error (ELOOP).

        Raises:
            OSError: as open(2).
        """
        return os.open(self.name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.directory)


class Walk:
    """The state of one walk: descriptors from the root to here, and the names still to go."""

    def __init__(self, root: int, path: str, owner: Owner | None, created: list[str] | None) -> None:
        self.stack = [os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)]
        self.names: list[str] = []
        self.rest = deque(_components(path))
        self.links = 0
        self.path = path
        self.owner = owner
        self.created = created

    def run(self, follow: bool) -> Place:
        """Walk to the end; see `Root.locate`."""
        while self.rest:
            name = self.rest.popleft()
            if name == "..":
                self._up()
                continue
            last = not self.rest
            if last and not follow:
                return self._place(name)
            try:
                descriptor = os.open(name, _PATH, dir_fd=self.stack[-1])
            except FileNotFoundError:
                if last:
                    return self._place(name)
                self._make(name)
                self.rest.appendleft(name)
                continue
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from error
            if (place := self._step(name, descriptor, last)) is not None:
                return place
        if len(self.stack) == 1:
            return Place(os.dup(self.stack[0]), ".", "/")
        name = self.names[-1]
        self._up()
        return self._place(name)

    def _place(self, name: str) -> Place:
        return Place(os.dup(self.stack[-1]), name, self._path(name))

    def _path(self, name: str) -> str:
        return "/" + "/".join([*self.names, name])

    def _step(self, name: str, descriptor: int, last: bool) -> Place | None:
        kept = False
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISLNK(mode):
                self._follow(descriptor)
            elif stat.S_ISDIR(mode):
                self._down(name, descriptor)
                kept = True
            elif last:
                return self._place(name)
            else:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.path)
        finally:
            if not kept:
                os.close(descriptor)
        return None

    def close(self) -> None:
        """Release all descriptors."""
        for descriptor in self.stack:
            os.close(descriptor)
        self.stack = []

    def _up(self) -> None:
        if len(self.stack) > 1:
            os.close(self.stack.pop())
            self.names.pop()

    def _down(self, name: str, descriptor: int) -> None:
        self.stack.append(descriptor)
        self.names.append(name)

    def _follow(self, link: int) -> None:
        self.links += 1
        if self.links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
        text = os.readlink("", dir_fd=link)
        if text.startswith("/"):
            while len(self.stack) > 1:
                self._up()
        self.rest.extendleft(reversed(_components(text)))

    def _make(self, name: str) -> None:
        """Create a missing directory if the walk may; somebody else may be faster."""
        if self.owner is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        try:
            os.mkdir(name, 0o755, dir_fd=self.stack[-1])
        except FileExistsError:
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=self.stack[-1])
        try:
            set_metadata(descriptor, Metadata(self.owner, 0o755))
        finally:
            os.close(descriptor)
        if self.created is not None:
            self.created.append(self._path(name))


def _components(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def set_metadata(descriptor: int, metadata: Metadata) -> None:
    """Set owner, mode and time of what is open."""
    # chown clears setuid and setgid (chown(2)), so the mode comes after it.
    os.fchown(descriptor, *metadata.owner)
    if metadata.mode is not None:
        os.fchmod(descriptor, metadata.mode)
    if metadata.mtime_ns is not None:
        os.utime(descriptor, ns=(metadata.mtime_ns, metadata.mtime_ns))
