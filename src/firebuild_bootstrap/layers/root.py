"""File operations that cannot leave a directory tree, whatever links it contains.

Every path is walked name by name with directory descriptors and O_NOFOLLOW. A symbolic link is read
and its text walked again inside the root, `..` goes back along the descriptors already held and never
above the root. So neither a planted link nor one that is swapped during the walk leads outside.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import NamedTuple

from .tar import write_all
from .tree import is_kept

_MAX_LINKS = 40  # as in the kernel (path_resolution(7))
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Owner = tuple[int, int]


_NO_XATTRS: Mapping[str, bytes] = MappingProxyType({})
_DEFAULT_LIST = "system.posix_acl_default"


class Metadata(NamedTuple):
    """What a file has besides its content.

    Args:
        owner: uid and gid.
        mode: 0 to 0o7777; None leaves it, and gives a new directory what mkdir(2) makes of 0755.
        mtime_ns: modification time in nanoseconds since 1970; None for now.
        xattrs: extended attributes by name; those that the file system or the kernel refuse are left out, and
            those that would mean something to an overlay, or belong to the building host.
    """

    owner: Owner = (0, 0)
    mode: int | None = None
    mtime_ns: int | None = None
    xattrs: Mapping[str, bytes] = _NO_XATTRS


class ResolvedPath:
    """A name in a directory inside the root; owns the directory's descriptor.

    `directory` is its descriptor, `name` the last component ("." for the root itself), `path` the
    whole path with all links resolved.
    """

    def __init__(self, directory: int, name: str, path: str) -> None:
        self.directory = directory
        self.name = name
        self.path = path

    def __enter__(self) -> ResolvedPath:
        return self

    def __exit__(self, *_: object) -> None:
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

    def __init__(
        self,
        root: int,
        path: str,
        owner: Owner | None,
        created: list[str] | None,
        passed: list[str] | None = None,
    ) -> None:
        self.stack = [os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)]
        self.names: list[str] = []
        self.rest = deque(_components(path))
        self.links = 0
        self.passed = passed
        self.path = path
        self.owner = owner
        self.created = created

    def run(self, follow: bool) -> ResolvedPath:
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
            return ResolvedPath(os.dup(self.stack[0]), ".", "/")
        name = self.names[-1]
        self._up()
        return self._place(name)

    def _place(self, name: str) -> ResolvedPath:
        return ResolvedPath(os.dup(self.stack[-1]), name, self._path(name))

    def _path(self, name: str) -> str:
        return "/" + "/".join([*self.names, name])

    def _step(self, name: str, descriptor: int, last: bool) -> ResolvedPath | None:
        kept = False
        try:
            mode = os.fstat(descriptor).st_mode
            if self.passed is not None:
                self.passed.append(self._path(name))
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
        """Create a missing directory if the walk may; it may be made concurrently."""
        if self.owner is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        try:
            os.mkdir(name, 0o755, dir_fd=self.stack[-1])
        except FileExistsError:
            return
        descriptor = os.open(name, _DIRECTORY, dir_fd=self.stack[-1])
        try:
            settle(descriptor, Metadata(self.owner))
        finally:
            os.close(descriptor)
        if self.created is not None:
            self.created.append(self._path(name))


def _components(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


@contextmanager
def unseen(place: ResolvedPath) -> Iterator[None]:
    """Keep what is done to the entries of a place's directory out of its modification time.

    Raises:
        OSError: what the block raises; it names the place where it names no path from the root.
    """
    before = os.stat(".", dir_fd=place.directory)

    def restore() -> None:
        os.utime(".", ns=(before.st_atime_ns, before.st_mtime_ns), dir_fd=place.directory)

    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # what went wrong before counts
            restore()
        if not isinstance(error, OSError) or not error.errno or str(error.filename or "").startswith("/"):
            raise
        raise OSError(error.errno, error.strerror, place.path) from error
    with suppress(FileNotFoundError):  # it was removed itself
        restore()


def set_metadata(descriptor: int, metadata: Metadata) -> None:
    """Set owner, mode and time of what is open, and of owner and mode only what is not right already."""
    found = os.fstat(descriptor)
    is_owned = (found.st_uid, found.st_gid) == metadata.owner
    # chown clears setuid, setgid and capabilities (chown(2)), so the rest comes after it.
    if not is_owned:
        os.fchown(descriptor, *metadata.owner)
    for name, value in metadata.xattrs.items():
        with suppress(OSError):
            if is_kept(name):
                os.setxattr(descriptor, name, value)
    # An attribute may be an access control list, which is a mode as well (acl(5)).
    is_right = is_owned and not metadata.xattrs and stat.S_IMODE(found.st_mode) == metadata.mode
    if metadata.mode is not None and not is_right:
        os.fchmod(descriptor, metadata.mode)
    if metadata.mtime_ns is not None:
        os.utime(descriptor, ns=(metadata.mtime_ns, metadata.mtime_ns))


def settle(descriptor: int, metadata: Metadata) -> None:
    """Set the metadata of a directory that was made a moment ago with 0755, and has no mode of its own.

    It inherits the set-group-ID bit, and where there is one a default access control list, which takes the
    place of the umask (mkdir(2), acl(5)): BuildKit leaves it at that, and so do we.
    """
    mode: int | None = 0o755 | (os.fstat(descriptor).st_mode & stat.S_ISGID)
    with suppress(OSError):  # a file system without them
        if _DEFAULT_LIST in os.listxattr(descriptor):
            mode = None
    set_metadata(descriptor, metadata._replace(mode=mode))


def make_link(directory: int, name: str, text: str, metadata: Metadata) -> None:
    """Make a symbolic link in the directory that is open; its mode can't be set on Linux.

    Raises:
        FileExistsError: something is there.
    """
    os.symlink(text, name, dir_fd=directory)
    os.chown(name, *metadata.owner, dir_fd=directory, follow_symlinks=False)
    if (time := metadata.mtime_ns) is not None:
        os.utime(name, ns=(time, time), dir_fd=directory, follow_symlinks=False)


class Root:
    """The directory tree below `path`, as the image sees it: `/` is `path`, and nothing is above it.

    All paths given to methods are absolute in the image or relative to its `/`.

    Raises:
        OSError: `path` is not a directory or can't be opened. All methods raise OSError for what the system
            refuses; its `filename` is the path inside the image.
    """

    def __init__(self, path: str, *, dir_fd: int | None = None) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)

    @property
    def descriptor(self) -> int:
        """The root's descriptor, which belongs to this object."""
        return self._fd

    def below(self, path: str) -> Root:
        """Return the directory that `path` leads to as a root of its own, which the caller closes."""
        with self.locate(path) as place:
            return Root(place.name, dir_fd=place.directory)

    def reopen(self) -> None:
        """Take what is mounted at `path` now for the root, and be open again after `close`."""
        self.close()
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the root's descriptor; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- finding ------------------------------------------------------------------------------

    def locate(
        self,
        path: str,
        *,
        follow: bool = True,
        parents: Owner | None = None,
        created: list[str] | None = None,
        passed: list[str] | None = None,
    ) -> ResolvedPath:
        """Find the directory and name that `path` leads to; what is there need not exist.

        Args:
            path: the path in the image.
            follow: resolve a symbolic link in the last component, even one that leads nowhere.
            parents: create missing parents (mode 0755) for this owner; None makes them an error.
            created: is extended by the parents that were created.
            passed: is extended by the links and directories on the way.
        """
        walk = Walk(self._fd, path, parents, created, passed)
        try:
            return walk.run(follow)
        finally:
            walk.close()

    def status(self, path: str, *, follow: bool = True) -> os.stat_result | None:
        """Return the status of what `path` leads to; None where nothing is, or a parent is missing."""
        try:
            with self.locate(path, follow=follow) as place:
                return place.status()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def is_directory(self, path: str) -> bool:
        """Say whether `path` leads to a directory, links followed inside the root."""
        found = self.status(path)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def read(self, path: str, limit: int) -> bytes:
        """Return the content of a regular file.

        Raises:
            OSError: it does not exist, is not a regular file (EINVAL) or longer than `limit` bytes (EFBIG).
        """
        with self.locate(path) as place:
            found = place.status()
            if found is not None and not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            # Without O_NONBLOCK a pipe that takes the file's place meanwhile would never open.
            descriptor = place.open(os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"longer than {limit} bytes", path)
        return content

    # --- changing -----------------------------------------------------------------------------

    def make_directory(
        self, path: str, metadata: Metadata, *, parents: Owner | None = None, replace: bool = False
    ) -> bool:
        """Make `path` a directory; one that exists, also behind a link, is left as it is.

        Args:
            path: the path in the image.
            metadata: what a new directory gets.
            parents: as in `locate`.
            replace: what is there and no directory is removed, a link to a directory too.

        Returns:
            Whether it was created.
        """
        with self.locate(path, follow=not replace, parents=parents) as place:
            try:
                os.mkdir(place.name, 0o755 if metadata.mode is None else 0o700, dir_fd=place.directory)
            except FileExistsError:
                found = place.status()
                if found is not None and replace and not stat.S_ISDIR(found.st_mode):
                    os.unlink(place.name, dir_fd=place.directory)
                    return self.make_directory(path, metadata)
                if found is None or not stat.S_ISDIR(found.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
                return False
            self._apply(place, metadata, settle if metadata.mode is None else set_metadata)
            return True

    def set_directory(self, path: str, metadata: Metadata) -> None:
        """Set the metadata of the directory that `path` leads to."""
        with self.locate(path) as place:
            self._apply(place, metadata)

    @staticmethod
    def _apply(
        place: ResolvedPath, metadata: Metadata, setter: Callable[[int, Metadata], None] = set_metadata
    ) -> None:
        descriptor = place.open(os.O_RDONLY | os.O_DIRECTORY)
        try:
            setter(descriptor, metadata)
        finally:
            os.close(descriptor)

    def write(
        self,
        path: str,
        content: Iterable[bytes] | Callable[[int], object],
        metadata: Metadata,
        *,
        follow: bool = False,
        replace: bool = False,
    ) -> None:
        """Write a file as a new one that takes the old one's place when it is complete.

        What was there (a file, link or special file) is replaced, not written through, so other names of
        it keep their content.

        Args:
            path: the path in the image; its parents exist.
            content: in chunks, or what writes it to a descriptor; its exceptions leave the old file in place.
            metadata: what the new file gets; setuid and setgid survive the change of owner.
            follow: where `path` is a link, replace or make what it leads to instead of the link.
            replace: remove a directory that is there, with everything in it.

        Raises:
            IsADirectoryError: a directory is there.
        """
        with self._replacing(path, follow, replace) as (place, name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(name, flags, 0o600, dir_fd=place.directory)
            with open(descriptor, "wb", buffering=0) as file:
                if callable(content):
                    content(descriptor)
                else:
                    for chunk in content:
                        write_all(descriptor, chunk)
                set_metadata(file.fileno(), metadata)

    def symlink(self, path: str, text: str, metadata: Metadata, *, replace: bool = False) -> None:
        """Create a symbolic link as `write` does a file; its mode can't be set on Linux."""
        with self._replacing(path, follow=False, replace=replace) as (place, name):
            make_link(place.directory, name, text, metadata)

    def node(
        self,
        path: str,
        kind: int,
        device: int,
        metadata: Metadata,
        *,
        follow: bool = False,
        replace: bool = False,
    ) -> None:
        """Create a FIFO or device node as `write` does a file.

        Args:
            path: the path in the image.
            kind: S_IFIFO, S_IFCHR or S_IFBLK.
            device: as os.makedev gives it.
            metadata: what it gets, but for extended attributes.
            follow: as in `write`.
            replace: as in `write`.
        """
        with self._replacing(path, follow, replace) as (place, name):
            os.mknod(name, 0o600 | kind, device, dir_fd=place.directory)
            os.chown(name, *metadata.owner, dir_fd=place.directory, follow_symlinks=False)
            if metadata.mode is not None:
                # Not a link: nobody else knows this name, and it was made a moment ago.
                os.chmod(name, metadata.mode, dir_fd=place.directory)
            if (time := metadata.mtime_ns) is not None:
                os.utime(name, ns=(time, time), dir_fd=place.directory, follow_symlinks=False)

    def hardlink(self, path: str, first: str, *, replace: bool = False) -> None:
        """Make `path` another name of `first`, as `write` does a file."""
        with (
            self.locate(first, follow=False) as origin,
            self._replacing(path, follow=False, replace=replace) as (place, name),
        ):
            os.link(
                origin.name,
                name,
                src_dir_fd=origin.directory,
                dst_dir_fd=place.directory,
                follow_symlinks=False,
            )

    def remove_if_empty(self, path: str) -> None:
        """Remove an empty directory or an empty file; leave everything else, and links, alone."""
        try:
            with self.locate(path, follow=False) as place:
                found = place.status()
                if found is None:
                    return
                if stat.S_ISDIR(found.st_mode):
                    os.rmdir(place.name, dir_fd=place.directory)
                elif stat.S_ISREG(found.st_mode) and found.st_size == 0:
                    os.unlink(place.name, dir_fd=place.directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EBUSY):
                raise

    @contextmanager
    def _replacing(self, path: str, follow: bool, replace: bool) -> Iterator[tuple[ResolvedPath, str]]:
        """Yield a free name beside `path`; what is created there is renamed to `path` at the end."""
        with self._target(path, follow) as place:
            found = place.status()
            in_the_way = found is not None and stat.S_ISDIR(found.st_mode)
            # The root itself, whose name is a dot, can't be replaced by anything.
            if in_the_way and (not replace or place.name == "."):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            name = _free_name()
            try:
                yield place, name
                if in_the_way:
                    remove_directory(place.name, place.directory)
                # rename() of two names of one file does nothing, hence the unlink below in any case.
                os.rename(name, place.name, src_dir_fd=place.directory, dst_dir_fd=place.directory)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=place.directory)

    def _target(self, path: str, follow: bool) -> ResolvedPath:
        if follow:
            # As BuildKit does: a link that leads to nothing, too, if there is a directory to make that in.
            with suppress(FileNotFoundError):
                return self.locate(path)
        return self.locate(path, follow=False)


def _free_name() -> str:
    return f".firebuild-{os.urandom(8).hex()}"


def remove_directory(name: str, parent: int) -> None:
    """Remove a directory of any depth with few descriptors: the way up is `..`.

    Its content must not be moved meanwhile. It is not flattened by renaming, which is quicker, because
    an overlay refuses that for the directories of its lower layers (EXDEV).

    Args:
        name: of the directory in `parent`; a link is an error.
        parent: descriptor of the directory above it.

    Raises:
        OSError: as rmdir(2) and unlink(2).
    """
    levels: list[tuple[str, list[str], os.stat_result]] = []
    here = os.dup(parent)
    todo = [name]
    try:
        while True:
            if todo:
                name = todo.pop()
                levels.append((name, todo, os.fstat(here)))
                below = _directory(name, here)
                os.close(here)
                here = below
                todo = [each for each in os.listdir(here) if not _unlinked(each, here)]
                continue
            if not levels:
                return
            name, todo, identity = levels.pop()
            above = _directory("..", here)
            os.close(here)
            here = above
            if not os.path.samestat(identity, os.fstat(here)):
                raise OSError(errno.ESTALE, "it was moved away while it was removed", name)
            os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _directory(name: str, parent: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _unlinked(name: str, parent: int) -> bool:
    """Remove what is not a directory, and say whether that was so."""
    if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        return False
    os.unlink(name, dir_fd=parent)
    return True
