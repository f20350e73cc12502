"""A tree of files, or the upper directory of an overlay, as entries in canonical order."""

from __future__ import annotations

import errno
import os
import re
import stat
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from functools import cache, partial
from typing import IO, Final, Generic, NamedTuple, TypeVar, cast

from .tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    HOLE_BYTES,
    OPAQUE,
    SYMLINK,
    WHITEOUT,
    WHITEOUT_PREFIX,
    Content,
    Entry,
    Kind,
    LayerError,
    Regions,
    changed,
)

# Kept: what a running system needs. Not kept: labels and trusted.*, which belong to the building host.
_KEPT_XATTRS: Final = ("security.capability", "user.", "system.posix_acl_")
# The kernel's own notes (Documentation/filesystems/overlayfs.rst); without privileges they are user.*.
# Where no overlay can be, neither can the device that means a whiteout: then it is a mark of our own.
OVERLAY_MARKS: Final = ("trusted.overlay.", "user.overlay.", "user.firebuild.")
WHITEOUT_MARK: Final = "user.firebuild.whiteout"
UNMOUNTABLE: Final = "user.firebuild.unmountable"
"""On the root of a layer with such whiteouts, which no kernel knows."""
OWNER_MARK: Final = "user.firebuild.owner"
"""On a file whose owner can't exist, because one id is all there is: `UID:GID:BITS` (`mark_owner`)."""
MAX_LAYERS: Final = 240
"""That can be mounted as one tree: mount(2) takes one page of options, and a name has up to 14 bytes."""
_FOREIGN_CONTENT: Final = ("redirect", "metacopy")
KINDS: Final[dict[int, Kind]] = {
    stat.S_IFREG: FILE,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFIFO: FIFO,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK_DEVICE,
}
_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a pipe put in the place of a file must not block.
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_OWNER: Final = re.compile(rb"([0-9]{1,10}):([0-9]{1,10}):([246]000|0)")
_NO_ID: Final = (1 << 32) - 1  # chown(2) takes it for "leave it"
_PROBE: Final = 64
_ZEROS: Final = bytes(HOLE_BYTES)
_PIECE: Final = 1 << 20
_NOT_SHARED: Final = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_CHECKED: Final = 64 << 20
_KNOWN: Final = 10_000  # names of one directory with their statuses
_HELD: Final = 128  # directories that are open at once, however deep a tree is

T = TypeVar("T")

Files = Iterator[tuple[Entry, Content]]
"""Entries, each with its content: of a file its descriptor, open until the next step.

Of a link, pipe or device that has more names it is a descriptor too, which says only that they may follow.
"""


def tree_entries(root: int | str, *, newest: int | None = None, only: Container[str] | None = None) -> Files:
    """Yield everything in a tree: parents before children, names in the order of their bytes.

    Sockets are left out, and so are extended attributes that belong to the building host.

    Args:
        root: the directory, by its path or as a descriptor, which stays open.
        newest: seconds since 1970; later modification times become this one (SOURCE_DATE_EPOCH).
        only: paths of what is wanted, each with the directories above it; None for everything.

    Raises:
        LayerError: a directory can't be read.
        OSError: anything else can't.
    """
    return _Entries(newest, only=only).run(root)


def upper_entries(
    upper: int | str, *, newest: int | None = None, marks: tuple[str, ...] = OVERLAY_MARKS[:2]
) -> Files:
    """Yield what an overlay has changed, from its upper directory, as a layer: `tree_entries` and whiteouts.

    In a directory whiteouts come before its other entries, as the OCI image specification asks for. The
    overlay is not mounted any more or nothing changes in it; `redirect_dir` and `metacopy` were off.

    Args:
        upper: the directory.
        newest: as for `tree_entries`.
        marks: what the kernel's own notes begin with; others are attributes that anybody can set.

    Raises:
        LayerError: as `tree_entries`; also where a file has a name that means a whiteout in a layer, or where
            the upper directory refers to files elsewhere.
    """
    return _Entries(newest, marks=marks).run(upper)


def statuses(root: int | str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of everything in a tree, in the order of `tree_entries`; no file is opened.

    What is mounted in there is not entered.

    Args:
        root: as for `tree_entries`.

    Raises:
        LayerError: a directory can't be read.
    """
    return _Statuses().run(root)


def members(root: int | str) -> Iterator[tuple[int, str, os.stat_result]]:
    """Yield everything in a tree but its root, however deep it is: what is in a directory after it.

    What is mounted in there is not entered. Each may be removed, if it is no directory.

    Args:
        root: as for `tree_entries`.

    Returns:
        of each the descriptor of its directory, valid until the next step, its name in there, and its status.

    Raises:
        LayerError: a directory can't be read.
        FileNotFoundError: something was removed by somebody else.
    """
    return _Members().run(root)


def check_names(root: int | str) -> None:
    """Make sure that no name in the tree of a layer means a whiteout in its archive; no file is opened.

    Raises:
        LayerError: one does, or a directory can't be read.
    """
    for path in _Reserved().run(root):
        raise reserved(path)


def reserved(path: str) -> LayerError:
    """Return the error for a file whose name means something else in the archive of a layer."""
    return LayerError(
        f"/{path} can't be kept in a layer, where names that begin with {WHITEOUT_PREFIX} mean that a file "
        "was removed",
        "give it another name",
    )


class TreeSource:
    """Entries that `apply` writes straight into another tree, content copied by the kernel where it can.

    Args:
        files: as `tree_entries` gives them.
        whiteouts: they are from `upper_entries`, and may remove something.
    """

    def __init__(self, files: Files, *, whiteouts: bool = False) -> None:
        self._files = files
        self.whiteouts = whiteouts
        self._regions: Regions = ()
        self._content: Content = b""
        self.name = ""
        """Path of the current entry."""

    def __iter__(self) -> Iterator[Entry]:
        for entry, content in self._files:
            self._content = content
            self.name = entry.path
            self._regions = entry.regions if entry.regions is not None else ((0, entry.size),)
            yield entry

    def copy_to(self, descriptor: int, size: int) -> None:
        """See `LayerReader.copy_to`."""
        source = cast(int, self._content)
        for offset, length in self._regions:
            if copy_region(source, descriptor, offset, length):
                raise changed(self.name)
        if not self._regions or sum(self._regions[-1]) < size:
            os.ftruncate(descriptor, size)


def copy_file(source: int, target: int, check: Callable[[], None] = lambda: None) -> None:
    """Copy a file into an empty one; where the file system has holes they stay holes.

    Args:
        source: descriptor of the file.
        target: descriptor of the other one.
        check: called between pieces; may raise.

    Raises:
        OSError: one of them can't be read or written, or the source became shorter meanwhile.
    """
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in _extents(source, size):
        for offset in range(start, end, _CHECKED):
            check()
            if copy_region(source, target, offset, min(end - offset, _CHECKED)):
                raise OSError(errno.EIO, "the file changed while it was read")


def copy_region(source: int, target: int, offset: int, length: int, place: int | None = None) -> int:
    """Copy a part of a file, and return how many bytes of it were not there.

    Args:
        source: descriptor of the file.
        target: descriptor of the other one.
        offset: where the part begins.
        length: how many bytes it has.
        place: where it goes in the other file; to the same place when None.

    Raises:
        OSError: one of them can't be read or written.
    """
    place = offset if place is None else place
    # copy_file_range(2) shares blocks on file systems that can, and refuses some pairs of others.
    shared = True
    while length:
        try:
            if shared:
                done = os.copy_file_range(source, target, length, offset, place)
            else:
                os.lseek(target, place, os.SEEK_SET)
                done = os.sendfile(target, source, offset, min(length, 1 << 30))
        except OSError as error:
            if not shared or error.errno not in _NOT_SHARED:
                raise
            shared = False
            continue
        if not done:
            break
        offset += done
        place += done
        length -= done
    return length


def data_regions(descriptor: int, size: int) -> Regions | None:
    """Return where a file of `size` bytes has data; None where it has no holes.

    Holes are what HOLE_BYTES says, whether the file system has holes there or zeros.
    """
    if size < HOLE_BYTES:
        return None
    # What is a hole already is not looked at: it may be terabytes.
    return find_regions(size, _extents(descriptor, size), partial(os.pread, descriptor))


def find_regions(
    size: int, extents: Iterable[tuple[int, int]], read: Callable[[int, int], bytes]
) -> Regions | None:
    """Return where a file has data, as `data_regions`.

    Args:
        size: of the file, in bytes.
        extents: (first byte, byte after the last) of what may not be zeros, in order.
        read: returns so many bytes (first argument) from an offset (second argument).
    """
    if size < HOLE_BYTES:
        return None
    regions: list[tuple[int, int]] = []
    at = 0
    for start, end in extents:
        at = max(at, start - start % HOLE_BYTES)
        while at < min(end, size):
            if _has_data(read, at):
                if regions and sum(regions[-1]) == at:
                    regions[-1] = (regions[-1][0], min(at + HOLE_BYTES, size) - regions[-1][0])
                else:
                    regions.append((at, min(HOLE_BYTES, size - at)))
            at += HOLE_BYTES
    return None if regions == [(0, size)] else tuple(regions)


def file_digest(file: IO[bytes], algorithm: str) -> str:
    """Return the digest of a file, in hexadecimal digits; to read holes would take longer than all else."""
    from hashlib import new  # a guest needs no digest

    found, zeros, at = new(algorithm), memoryview(bytes(_PIECE)), 0
    size = os.fstat(file.fileno()).st_size
    for start, end in (*_extents(file.fileno(), size), (size, size)):
        for left in range(start - at, 0, -_PIECE):
            found.update(zeros[:left])
        at = start
        while at < end and (piece := os.pread(file.fileno(), min(_PIECE, end - at), at)):
            found.update(piece)
            at += len(piece)
    return found.hexdigest()


def _extents(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has no hole, as the file system knows it: first byte, byte after the last."""
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole up to the end
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _has_data(read: Callable[[int, int], bytes], at: int) -> bool:
    if read(_PROBE, at).strip(b"\0"):
        return True
    data = read(HOLE_BYTES, at)
    return data != _ZEROS[: len(data)]


class _Level(NamedTuple):
    """A directory on the way: its path with a slash, and what is still to be visited in it."""

    path: str
    names: Iterator[tuple[str, os.stat_result]]


class _Walk(Generic[T]):
    """The way through a tree of any depth; what it yields is decided by those that visit."""

    def __init__(self) -> None:
        self._root = -1
        self._levels: list[_Level] = []
        self._descriptors: list[int] = []  # of the levels; -1 where it is closed to keep their number low

    def run(self, root: int | str) -> Iterator[T]:
        """Walk through the tree `root`."""
        if isinstance(root, int):
            self._root = os.dup(root)
        else:
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield from self._directory("", os.dup(self._root), os.fstat(self._root))
            while self._levels:
                name, status = next(self._levels[-1].names, ("", None))
                if status is not None:
                    yield from self._visit(self._levels[-1].path + name, name, status)
                    continue
                self._levels.pop()
                if (descriptor := self._descriptors.pop()) >= 0:
                    os.close(descriptor)
        finally:
            for descriptor in (self._root, *self._descriptors):
                if descriptor >= 0:
                    os.close(descriptor)

    @abstractmethod
    def _directory(self, path: str, descriptor: int, status: os.stat_result) -> Iterator[T]:
        """Yield what there is to say about a directory, having called `_hold` and then `_down`."""

    @abstractmethod
    def _visit(self, path: str, name: str, status: os.stat_result) -> Iterator[T]:
        """Yield what there is to say about something in the current directory."""

    def _hold(self, descriptor: int) -> Callable[[], Iterable[tuple[str, os.stat_result]]]:
        """Take over the descriptor of the next level, and return what says what it holds, in order.

        While that is asked the level is the last one. Of many names the status is not kept, but read again:
        it takes ten times the memory of the name.
        """
        self._keep(descriptor)
        names = sorted(os.listdir(descriptor), key=os.fsencode)

        def look() -> Iterator[tuple[str, os.stat_result]]:
            for name in names:
                yield name, os.stat(name, dir_fd=self._parent(), follow_symlinks=False)

        if len(names) > _KNOWN:
            return look
        known = list(look())
        return lambda: known

    def _keep(self, descriptor: int) -> None:
        self._descriptors.append(descriptor)  # closed with all others
        if len(self._descriptors) > _HELD and (far := self._descriptors[-_HELD]) >= 0:
            os.close(far)
            self._descriptors[-_HELD] = -1

    def _down(self, path: str, found: Iterable[tuple[str, os.stat_result]]) -> None:
        self._levels.append(_Level(f"{path}/" if path else "", iter(found)))

    def _parent(self) -> int:
        """Return the descriptor of the last level, opened again if it was closed meanwhile."""
        if self._descriptors[-1] < 0:
            current = os.dup(self._root)
            for name in self._levels[-1].path.split("/")[:-1]:
                below = _enter(self._levels[-1].path, name, current)
                os.close(current)
                current = below
            self._descriptors[-1] = current
        return self._descriptors[-1]


class _Statuses(_Walk[tuple[str, os.stat_result]]):
    def _directory(
        self, path: str, descriptor: int, status: os.stat_result
    ) -> Iterator[tuple[str, os.stat_result]]:
        self._down(path, self._hold(descriptor)())
        yield path, status

    def _visit(self, path: str, name: str, status: os.stat_result) -> Iterator[tuple[str, os.stat_result]]:
        parent = self._parent()
        if stat.S_ISDIR(status.st_mode) and status.st_dev == os.fstat(parent).st_dev:
            yield from self._directory(path, _enter(path, name, parent), status)
        elif stat.S_IFMT(status.st_mode) in KINDS:
            yield path, status


class _Members(_Walk[tuple[int, str, os.stat_result]]):
    def _directory(
        self, path: str, descriptor: int, status: os.stat_result
    ) -> Iterator[tuple[int, str, os.stat_result]]:
        found = self._hold(descriptor)
        self._down(path, found() if status.st_dev == os.fstat(self._root).st_dev else ())
        yield from ()

    def _visit(
        self, path: str, name: str, status: os.stat_result
    ) -> Iterator[tuple[int, str, os.stat_result]]:
        parent = self._parent()
        yield parent, name, status
        if stat.S_ISDIR(status.st_mode):
            yield from self._directory(path, _enter(path, name, parent), status)


class _Reserved(_Walk[str]):
    """Yields the names that are reserved: what is a directory tells the list of names, without stat(2)."""

    def _directory(self, path: str, descriptor: int, status: os.stat_result) -> Iterator[str]:
        self._keep(descriptor)
        inner = f"{path}/" if path else ""
        below = []
        with os.scandir(descriptor) as found:
            for each in found:
                if each.name.startswith(WHITEOUT_PREFIX):
                    yield inner + each.name
                if each.is_dir(follow_symlinks=False):
                    below.append((each.name, status))
        self._down(path, below)

    def _visit(self, path: str, name: str, status: os.stat_result) -> Iterator[str]:
        yield from self._directory(path, _enter(path, name, self._parent()), status)


class _Entries(_Walk[tuple[Entry, Content]]):
    def __init__(
        self, newest: int | None, *, marks: tuple[str, ...] = (), only: Container[str] | None = None
    ) -> None:
        super().__init__()
        self._newest = None if newest is None else newest * 10**9
        self._marks = marks
        self._only = only
        self._marked = False
        self._first_names: dict[tuple[int, int], str] = {}

    def _visit(self, path: str, name: str, status: os.stat_result) -> Files:
        kind = KINDS.get(stat.S_IFMT(status.st_mode))
        if kind is None or (self._only is not None and path not in self._only):
            return
        parent = self._parent()
        if kind == DIRECTORY:
            yield from self._directory(path, _enter(path, name, parent), status)
        elif kind == FILE:
            yield from self._file(path, os.open(name, _OPEN, dir_fd=parent), status)
        else:
            entry = self._entry(path, kind, status)
            if (first := self._first_name(path, status)) != path:
                yield entry._replace(kind=HARDLINK, linkname=first), b""
                return
            if kind == SYMLINK:
                entry = entry._replace(linkname=os.readlink(name, dir_fd=parent))
            elif kind != FIFO:
                entry = entry._replace(device=(os.major(status.st_rdev), os.minor(status.st_rdev)))
            yield entry, parent if status.st_nlink > 1 else b""

    def _directory(self, path: str, descriptor: int, status: os.stat_result) -> Files:
        found = self._hold(descriptor)
        xattrs, notes = self._xattrs(path, descriptor)
        if not path:
            self._marked = UNMOUNTABLE in attribute_names(descriptor)
        inner = f"{path}/" if path else ""
        entry = self._owned(self._entry(path, DIRECTORY, status), descriptor)
        yield entry._replace(xattrs=xattrs), b""
        if self._marks:
            if notes.get("opaque") == b"y":
                yield Entry(path, OPAQUE), b""
            removed = {name for name, status in found() if self._is_whiteout(descriptor, name, status)}
            for name, _ in found():
                if name in removed:
                    yield Entry(inner + name, WHITEOUT), b""
                elif name.startswith(WHITEOUT_PREFIX):
                    raise reserved(inner + name)
            self._down(path, (each for each in found() if each[0] not in removed))
        else:
            self._down(path, found())

    def _file(self, path: str, descriptor: int, status: os.stat_result) -> Files:
        try:
            entry = self._owned(self._entry(path, FILE, status), descriptor)
            if (first := self._first_name(path, status)) != path:
                yield entry._replace(kind=HARDLINK, linkname=first), b""
                return
            size = status.st_size
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise changed(path)
            xattrs, _ = self._xattrs(path, descriptor)
            regions = data_regions(descriptor, size)
            yield entry._replace(size=size, xattrs=xattrs, regions=regions), descriptor
        finally:
            os.close(descriptor)

    def _first_name(self, path: str, status: os.stat_result) -> str:
        """Return the name under which this came before: links, pipes and devices have several as files do."""
        if status.st_nlink < 2:
            return path
        return self._first_names.setdefault((status.st_dev, status.st_ino), path)

    def _owned(self, entry: Entry, descriptor: int) -> Entry:
        """Return an entry with the owner, and the bits, that its file would have where all ids exist."""
        if not has_one_id():
            return entry
        try:
            found = _OWNER.fullmatch(os.getxattr(descriptor, OWNER_MARK))
        except OSError:  # most have none
            return entry
        if found is None:
            return entry
        uid, gid, bits = (int(text, base) for text, base in zip(found.groups(), (10, 10, 8), strict=True))
        return entry._replace(uid=uid, gid=gid, mode=entry.mode | bits) if max(uid, gid) < _NO_ID else entry

    def _entry(self, path: str, kind: Kind, status: os.stat_result) -> Entry:
        time = status.st_mtime_ns
        if self._newest is not None and time > self._newest:
            time = self._newest
        return Entry(path, kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, time)

    def _xattrs(self, path: str, descriptor: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return the attributes that belong to an image, and the overlay's own notes without their prefix."""
        names = attribute_names(descriptor)
        if not names:
            return {}, {}
        kept = sorted(filter(is_kept, names))
        found = {name: os.getxattr(descriptor, name) for name in kept}
        notes: dict[str, bytes] = {}
        if self._marks:
            for name in names:
                if name.startswith(self._marks):
                    notes[name.split(".", 2)[2]] = os.getxattr(descriptor, name)
            for note in _FOREIGN_CONTENT:
                if note in notes:
                    raise LayerError(
                        f"/{path} has its content or its name elsewhere (overlay.{note})",
                        "mount the overlay with redirect_dir=off,metacopy=off",
                    )
        return found, notes

    def _is_whiteout(self, directory: int, name: str, status: os.stat_result) -> bool:
        if stat.S_ISCHR(status.st_mode):
            return status.st_rdev == 0
        if status.st_size or not stat.S_ISREG(status.st_mode):
            return False
        descriptor = os.open(name, _OPEN, dir_fd=directory)
        try:
            # Everybody may give a file our own mark, which means nothing where overlays are mounted.
            names = {f"{mark}whiteout" for mark in self._marks} | ({WHITEOUT_MARK} if self._marked else set())
            return not names.isdisjoint(attribute_names(descriptor))
        finally:
            os.close(descriptor)


def attribute_names(file: int | str) -> list[str]:
    """Return the names of the extended attributes of a file; none where its file system has no such thing."""
    try:
        return os.listxattr(file)
    except OSError:  # a file system without extended attributes
        return []


@cache
def has_one_id() -> bool:
    """Whether nobody but root exists here: the sandbox of a user without subordinate ids (`ids: single`).

    Owners are marks there, which all users that there are may set. Elsewhere a mark means nothing, or a RUN
    that is not root could make a file of root's.
    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return sum(int(line.split()[2]) for line in file) == 1


def mark_owner(descriptor: int, entry: Entry) -> bool:
    """Keep the owner of a file, and its set-user-ID and set-group-ID bits, as a mark, if owners are marks."""
    if not has_one_id() or max(entry.uid, entry.gid) >= _NO_ID:
        return False
    bits = entry.mode & 0o6000 if entry.kind == FILE else 0
    try:
        os.setxattr(descriptor, OWNER_MARK, f"{entry.uid}:{entry.gid}:{bits:o}".encode())
    except OSError:  # a file system that has no such attributes
        return False
    return True


def is_kept(attribute: str) -> bool:
    """Tell whether an extended attribute belongs to an image, by its name."""
    return attribute.startswith(_KEPT_XATTRS) and not attribute.startswith(OVERLAY_MARKS)


def _enter(path: str, name: str, parent: int) -> int:
    try:
        return os.open(name, _ENTER, dir_fd=parent)
    except OSError as error:
        raise LayerError(f"/{path}: {error.strerror}") from error
