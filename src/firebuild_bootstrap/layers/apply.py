"""A layer -> a tree: owners by number, all mode bits, times, links, attributes, holes; whiteouts applied."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, Protocol

from .reader import DamagedArchive
from .root import Root, remove_directory
from .tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    OPAQUE,
    SYMLINK,
    WHITEOUT,
    Entry,
    LayerError,
)
from .tree import OWNER_MARK, is_kept, mark_owner

_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NOTED: Final = 16 * 1024 * 1024
_OWNER: Final = (0, 0)
DEEPEST: Final = 64 * 1024 * 1024
"""Bytes of the paths of one entry and all directories above it: 8,000 with the shortest names, 700 with the
longest. A path of 16 MiB (`reader.Limits.header`) would take terabytes.
"""
_HELD: Final = 128  # directories that are open at once, however deep a tree is
REMEMBERED: Final = 512 * 1024 * 1024
"""Bytes of directories, whose attributes are set when everything is in them: some hundred thousand."""
ENTRY_BYTES: Final = 512
"""Of one of them without its name and extended attributes."""
# Directories that no entry describes: one name of a kilobyte asks for 500 of them, and compresses to nothing.
_MOST_MADE: Final = 1_000_000
_EXAMPLES: Final = 3
_LONGEST: Final = 4096  # characters of one
_SHOWN: Final = 80
# What a hard link fails with because of the file system, and not of what the archive says.
_OF_THE_DISK: Final = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EMLINK,
        errno.EROFS,
        errno.ENOMEM,
        errno.EMFILE,
        errno.ENFILE,
    )
)
_Loss = Literal["devices", "foreign", "stripped", "attributes"]


class UnpackReport(NamedTuple):
    """What was written, and what could not be kept as it was in the archive.

    Args:
        members: number of members written.
        devices: device nodes that were left out (outside of /dev, which every machine has its own of).
        foreign: members whose owner does not exist in this id mapping, could not be kept as a mark
            (`tree.mark_owner`) either, and that belong to root now.
        stripped: those of them that lost their setuid or setgid bit, which must not mean root.
        attributes: extended attributes that could not be set.
        examples: a few names for each of these lists, by the list's name.
    """

    members: int = 0
    devices: int = 0
    foreign: int = 0
    stripped: int = 0
    attributes: int = 0
    examples: Mapping[str, list[str]] = MappingProxyType({})

    def notes(self, source: str = "the base") -> tuple[str, ...]:
        """Say what unpacking `source` could not keep."""
        texts = {
            "foreign": f"files of {source} belong to root now, because their owners don't exist in this "
            "build's id mapping",
            "stripped": "of them lost their setuid or setgid bit, which would have meant root",
            "devices": f"device nodes of {source} were left out, which a sandbox can't make",
            "attributes": f"extended attributes of {source} could not be set",
        }
        notes = []
        for what, text in texts.items():
            count, names = getattr(self, what), self.examples.get(what, [])
            if count:
                more = ", …" if count > len(names) else ""
                notes.append(f"{count} {text}: {', '.join(names)}{more}")
        return tuple(notes)


class EntrySource(Protocol):
    """What `apply` reads: a `LayerReader`, or a `TreeSource`."""

    @property
    def name(self) -> str:
        """The current entry's name where it comes from."""

    @property
    def whiteouts(self) -> bool:
        """Whether there may be entries that remove something."""

    def __iter__(self) -> Iterator[Entry]: ...

    def copy_to(self, descriptor: int, size: int) -> None:
        """Write the content of the current file into an empty file of `size` bytes; holes stay holes."""


def apply(layer: EntrySource, root: Root, *, devices: bool = False, marks: str = "") -> UnpackReport:
    """Write all entries of a layer into a tree, and remove what its whiteouts name.

    Symbolic links on the way to an entry are followed as if the root were `/`; one at the entry's own place
    is replaced. A directory that no entry describes is made with 0755, for root and with the time 0; one that
    was there keeps its time, whatever comes to lie in it. So the same layers are the same tree at any time.

    Args:
        layer: read to its end.
        root: may hold the layers below.
        devices: make device nodes, which only the machine's root can; else they are left out.
        marks: one of `OVERLAY_MARKS` where the tree is empty and becomes a layer of an overlay: whiteouts are
            kept, in the way of the kernel (Documentation/filesystems/overlayfs.rst).

    Raises:
        DamagedArchive: the layer is damaged, beyond its limits, or does not fit into the tree.
        LayerError: a hard link could not be made.
        OSError: the file system refused something.
    """
    return _Application(layer, root, devices=devices, marks=marks).run()


class _Application:
    def __init__(self, layer: EntrySource, root: Root, *, devices: bool, marks: str) -> None:
        self._layer = layer
        self._place = _Descent(root)
        self._devices = devices
        self._marks = marks
        self._counts = Counter[str]()
        self._examples: dict[str, list[str]] = {}
        # Finished last, because every new file changes the time of its directory. Here and in what follows
        # paths have no links in them: two entries may name one directory in two ways.
        self._directories: dict[str, Entry] = {}
        self._remembered = 0
        # Whiteouts mean the layers below, and not this one; where nothing is below they mean nothing.
        filled = bool(os.listdir(root.descriptor))
        self._removes = layer.whiteouts and not marks and filled
        self._root_time = os.fstat(root.descriptor).st_mtime_ns if filled else 0
        self._written: set[int] = set()  # hashes of paths, which are keyed and take a third of the memory

    def run(self) -> UnpackReport:
        try:
            for entry in self._layer:
                try:
                    self._entry(entry)
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                    name = f"{entry.path[:_SHOWN]!r}"
                    raise DamagedArchive(f"{name} is a longer name or link than Linux allows") from error
            for path in self._place.made:
                self._directories.setdefault(path, Entry(path, DIRECTORY, 0o755))
            self._restore_times()
            for path in sorted(self._directories, reverse=True):  # children first: a mode may lock them out
                descriptor = self._place.existing(path)
                if descriptor is not None:
                    try:
                        self._finish(descriptor, self._directories[path])
                    finally:
                        os.close(descriptor)
        finally:
            self._place.close()
        return UnpackReport(**self._counts, examples=self._examples)

    def _restore_times(self) -> None:
        """Give the directories that no entry describes the times that they had before."""
        for path, time in {**self._place.found, "": self._root_time}.items():
            if path in self._directories or (descriptor := self._place.existing(path)) is None:
                continue
            try:
                os.utime(descriptor, ns=(time, time))
            finally:
                os.close(descriptor)

    def _lost(self, what: _Loss, name: str) -> None:
        self._counts[what] += 1
        names = self._examples.setdefault(what, [])
        if len(names) < _EXAMPLES:
            names.append(name[:_LONGEST])

    def _entry(self, entry: Entry) -> None:
        if entry.kind in (WHITEOUT, OPAQUE):
            if self._marks:
                self._mark(entry)
            elif self._removes:
                self._remove(entry)
            return
        if entry.kind in (CHARACTER, BLOCK_DEVICE) and not self._devices:
            if entry.path.partition("/")[0] != "dev":
                self._lost("devices", self._layer.name)
            return
        parent, _, name = entry.path.rpartition("/")
        directory = self._place.directory(parent)
        path = self._place.path_of(name)
        if entry.kind == DIRECTORY:
            self._directory(entry, path, directory)
        elif entry.path:
            self._directories.pop(path, None)
            try:
                self._write(entry, directory, name)
            except FileExistsError:
                self._clear_way(parent, name)
                self._write(entry, self._place.directory(parent), name)
        if self._removes:
            self._written.add(hash(path))
        self._counts["members"] += 1

    def _directory(self, entry: Entry, path: str, directory: int) -> None:
        if path:
            parent, _, name = entry.path.rpartition("/")
            try:
                os.mkdir(name, 0o700, dir_fd=directory)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                    self._clear_way(parent, name)
                    os.mkdir(name, 0o700, dir_fd=self._place.directory(parent))
        self._directories[path] = entry
        attributes = sum(len(name) + len(value) for name, value in entry.xattrs.items())
        self._remembered += ENTRY_BYTES + len(entry.path) + attributes
        if self._remembered > REMEMBERED:
            raise DamagedArchive(
                f"a layer with too many directories to unpack: {len(self._directories)}, with names "
                f"and attributes of more than {REMEMBERED >> 20} MiB"
            )

    def _write(self, entry: Entry, parent: int, name: str) -> None:
        if entry.kind == FILE:
            descriptor = os.open(name, _CREATE, 0o600, dir_fd=parent)
            try:
                self._layer.copy_to(descriptor, entry.size)
                self._finish(descriptor, entry)
            finally:
                os.close(descriptor)
        elif entry.kind == SYMLINK:
            os.symlink(entry.linkname, name, dir_fd=parent)
            self._finish_node(entry, parent, name)
            self._place.forget()  # a path may lead elsewhere now
        elif entry.kind == HARDLINK:
            self._hard_link(entry, parent, name)
        elif entry.kind == FIFO:
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._finish_node(entry, parent, name)
        else:
            kind = stat.S_IFCHR if entry.kind == CHARACTER else stat.S_IFBLK
            os.mknod(name, 0o600 | kind, os.makedev(*entry.device), dir_fd=parent)
            self._finish_node(entry, parent, name)

    def _hard_link(self, entry: Entry, parent: int, name: str) -> None:
        parent = os.dup(parent)
        try:
            above, _, first = entry.linkname.rpartition("/")
            source = self._place.directory(above)
            os.link(first or ".", name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError as error:
            link = f"a hard link to {entry.linkname or '/'!r}"
            failure = LayerError if error.errno in _OF_THE_DISK else DamagedArchive
            raise failure(f"its member {entry.path!r} is {link}: {error.strerror}") from error
        finally:
            os.close(parent)

    # --- removing ---------------------------------------------------------------------------------

    def _mark(self, entry: Entry) -> None:
        if entry.kind == OPAQUE:
            os.setxattr(self._place.directory(entry.path), f"{self._marks}opaque", b"y")
            return
        parent, _, name = entry.path.rpartition("/")
        with suppress(FileExistsError):  # what this layer has put there stays
            # Everybody may make this one device node, since Linux 5.8.
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=self._place.directory(parent))

    def _remove(self, entry: Entry) -> None:
        """Remove what a whiteout names; what this layer has put there stays."""
        above, _, own = entry.path.rpartition("/")
        parent = entry.path if entry.kind == OPAQUE else above
        try:
            directory = self._place.directory(parent, make=False)
        except (OSError, LayerError):  # there is nothing to remove
            return
        names = os.listdir(directory) if entry.kind == OPAQUE else [own]
        for name, path in [(name, self._place.path_of(name)) for name in names]:
            if hash(path) not in self._written:
                self._clear_way(parent, name)

    def _clear_way(self, parent: str, name: str) -> None:
        directory = self._place.directory(parent)
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            remove_directory(name, directory)
        else:
            os.unlink(name, dir_fd=directory)
        if not stat.S_ISREG(found.st_mode):
            self._place.forget()

    # --- metadata ---------------------------------------------------------------------------------

    def _finish(self, descriptor: int, entry: Entry) -> None:
        marked = False
        # chown clears setuid, setgid and capabilities (chown(2)), so it comes first.
        lost = not self._own(entry, descriptor)
        if entry.kind == DIRECTORY:
            _clear(descriptor, entry)
        if lost and not (marked := mark_owner(descriptor, entry)):
            self._lost("foreign", f"{entry.path} ({entry.uid}:{entry.gid})")
        mode = entry.mode
        if lost and mode & 0o6000 and entry.kind != DIRECTORY:
            if not marked:
                self._lost("stripped", entry.path)
            mode &= 0o1777
        for name, value in entry.xattrs.items():
            try:
                if not is_kept(name):  # it may mean something to an overlay, or to the host as a label does
                    raise OSError(errno.EPERM, "it would mean something to the kernel")
                os.setxattr(descriptor, name, value)
            except OSError:
                self._lost("attributes", f"{entry.path} ({name})")
        os.chmod(descriptor, mode)
        os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))

    def _finish_node(self, entry: Entry, parent: int, name: str) -> None:
        """Set the metadata of what is not opened: a link, a pipe, a device."""
        lost = not self._own(entry, name, parent)
        if lost:
            self._lost("foreign", f"{entry.path} ({entry.uid}:{entry.gid})")
        if entry.kind != SYMLINK:
            # Not followed: nothing else has this name, which was made a moment ago.
            os.chmod(name, entry.mode & (0o1777 if lost else 0o7777), dir_fd=parent)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _own(self, entry: Entry, what: int | str, parent: int | None = None) -> bool:
        """Give a file its owner; False when it does not exist in this mapping."""
        try:
            if isinstance(what, int):
                os.chown(what, entry.uid, entry.gid)
            else:
                os.chown(what, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        except OverflowError:
            return False
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EPERM):
                raise
            return False
        return True


def _clear(descriptor: int, entry: Entry) -> None:
    """Remove the attributes of a directory that was there: an overlay shows those of the upper one only."""
    with suppress(OSError):  # a file system without them
        for name in os.listxattr(descriptor):
            if (is_kept(name) and name not in entry.xattrs) or name == OWNER_MARK:
                os.removexattr(descriptor, name)


class _Descent:
    """Descriptors of a directory and of those above it: neighbours in an archive share their way."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._top = root.descriptor
        self._paths: list[str] = []
        self._real: list[str] = []  # the same without links
        self._current = ""
        self._descriptors: list[int] = []  # of `paths`; -1 where it is closed to keep their number low
        self.made: list[str] = []
        """Directories that were missing, as far as their paths and those of `found` fit into 16 MiB."""
        self.found: dict[str, int] = {}
        """The times of directories that were there when they were entered first."""
        self._noted = 0
        self._missing = 0
        self._size = 0  # of all of them

    def close(self) -> None:
        """Close all descriptors."""
        self.forget()

    def forget(self) -> None:
        """Drop what is remembered: what a path means may have changed."""
        while self._paths:
            self._pop()

    def directory(self, path: str, *, make: bool = True) -> int:
        """Return a descriptor of the directory `path`, by default made with its parents where missing.

        It belongs to this object and stays valid until the next call.

        Raises:
            DamagedArchive: something on the way is not a directory, links form a loop, or it is too deep.
            FileNotFoundError: it is missing, and is not to be made.
        """
        paths, descriptors = self._paths, self._descriptors
        while paths and (descriptors[-1] < 0 or not (path == paths[-1] or path.startswith(f"{paths[-1]}/"))):
            self._pop()
        done = len(paths[-1]) + 1 if paths else 0
        for name in path[done:].split("/") if path[done:] else ():
            parent = descriptors[-1] if descriptors else self._top
            way = f"{paths[-1]}/{name}" if paths else name
            if self._size + len(way) > DEEPEST:
                raise DamagedArchive(f"/{path[:_SHOWN]}… is too deep: more than {len(paths)} directories")
            self._push(way, *self._enter(parent, name, way, make))
        self._current = self._real[-1] if paths else ""
        return descriptors[-1] if descriptors else self._top

    def path_of(self, name: str) -> str:
        """Return the path, without links, of a name in the directory that was asked for last."""
        return f"{self._current}/{name}" if self._current and name else self._current or name

    def existing(self, path: str) -> int | None:
        """Open what is a directory at `path` itself (no link); the caller closes it."""
        if not path:
            return os.dup(self._top)
        parent, _, name = path.rpartition("/")
        try:
            return os.open(name, _ENTER, dir_fd=self.directory(parent, make=False))
        except (OSError, LayerError):
            return None

    def _enter(self, parent: int, name: str, path: str, make: bool) -> tuple[str, int]:
        """Return the path of a directory without links, and its descriptor."""
        real = f"{self._real[-1]}/{name}" if self._real else name
        try:
            descriptor = os.open(name, _ENTER, dir_fd=parent)
            self._note(real, descriptor)
            return real, descriptor
        except FileNotFoundError:
            if not make:
                raise
            self._missing += 1
            if self._missing > _MOST_MADE:
                raise DamagedArchive(
                    f"it needs more than {_MOST_MADE} directories that it does not have"
                ) from None
            os.mkdir(name, 0o755, dir_fd=parent)
            self._note_made(real)
            return real, os.open(name, _ENTER, dir_fd=parent)
        except OSError:
            return self._through_link(path, make)

    def _through_link(self, path: str, make: bool) -> tuple[str, int]:
        try:
            with self._root.locate(path, parents=_OWNER if make else None) as place:
                if make and place.status() is None:
                    os.mkdir(place.name, 0o755, dir_fd=place.directory)
                    self._note_made(place.path[1:])
                descriptor = place.open(os.O_RDONLY | os.O_DIRECTORY)
                self._note(place.path[1:], descriptor)
                return place.path[1:], descriptor
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DamagedArchive(f"/{path}: its symbolic links form a loop") from error
            if error.errno == errno.ENOTDIR:
                raise DamagedArchive(f"/{path} is needed as a directory and is not one") from error
            raise

    def _note_made(self, path: str) -> None:
        self._noted += len(path)
        if self._noted < _NOTED:  # one long name may make thousands of directories
            self.made.append(path)

    def _note(self, path: str, descriptor: int) -> None:
        """Remember the time of a directory, into which something is about to be written."""
        if path not in self.found and self._noted < _NOTED:
            self._noted += len(path)
            self.found[path] = os.fstat(descriptor).st_mtime_ns

    def _push(self, path: str, real: str, descriptor: int) -> None:
        self._paths.append(path)
        self._real.append(real)
        self._size += max(len(path), len(real))
        self._descriptors.append(descriptor)
        if len(self._descriptors) > _HELD and (far := self._descriptors[-_HELD]) >= 0:
            os.close(far)
            self._descriptors[-_HELD] = -1

    def _pop(self) -> None:
        self._size -= max(len(self._paths.pop()), len(self._real.pop()))
        if (descriptor := self._descriptors.pop()) >= 0:
            os.close(descriptor)
