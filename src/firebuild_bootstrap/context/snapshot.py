"""The files of an image or a finished stage, read from its archive without unpacking it.

The archive may come from a guest: it is read as data only, and its links are followed inside of it.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from firebuild_bootstrap.context.entries import NO_ATTRIBUTES, kept
from firebuild_bootstrap.context.root import FileRoot, Node, Parts
from firebuild_bootstrap.errors import MachineError, reason_of
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader
from firebuild_bootstrap.layers.tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    Entry,
    Regions,
)
from firebuild_bootstrap.wire import CHUNK_BYTES
from firebuild_pki.values import dataclass

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_KINDS: Final = {
    FILE: stat.S_IFREG,
    DIRECTORY: stat.S_IFDIR,
    SYMLINK: stat.S_IFLNK,
    FIFO: stat.S_IFIFO,
    CHARACTER: stat.S_IFCHR,
    BLOCK_DEVICE: stat.S_IFBLK,
}


@dataclass(frozen=False)
class _File:
    """One file of the archive.

    Args:
        status: its owner, mode, size and time.
        link_text: of a symbolic link.
        regions: of a regular file: where its data is, as (offset in the file, length, offset in the archive).
        attributes: its extended attributes.
        children: of a directory, by name.
    """

    status: os.stat_result
    link_text: str = ""
    regions: tuple[tuple[int, int, int], ...] = ()
    attributes: Mapping[str, bytes] = field(default_factory=lambda: NO_ATTRIBUTES)
    children: dict[str, _File] = field(default_factory=dict)


class SnapshotRoot(FileRoot):
    """What a root file system holds, from its uncompressed tar archive.

    Args:
        archive: the archive; None for an empty root.

    Raises:
        MachineError: it is damaged or can't be read.
    """

    def __init__(self, archive: Path | None) -> None:
        self._top = _File(_status(stat.S_IFDIR | 0o755))
        self._descriptor = -1
        if archive is None:
            return
        try:
            with open(archive, "rb") as file:
                self._descriptor = os.dup(file.fileno())
                self._close = weakref.finalize(self, os.close, self._descriptor)
                self._read(LayerReader(file.fileno()))
        except (DamagedArchive, OSError) as error:
            raise MachineError(f"{archive} can't be read: {reason_of(error)}") from error

    def close(self) -> None:
        """Let go of the archive; may be called again."""
        if self._descriptor >= 0:
            self._close()

    def node(self, parts: Sequence[str]) -> Node:
        """Look at `parts` without following links; see `FileRoot.node`."""
        return Node(tuple(parts), self._find(parts).status)

    def read_link(self, parts: Sequence[str]) -> str:
        """Return the text of the symbolic link at `parts`."""
        return self._find(parts).link_text

    def children(self, parts: Sequence[str]) -> list[Node]:
        """Return what the directory `parts` holds, sorted by name; see `FileRoot.children`."""
        found = self._find(parts)
        if not stat.S_ISDIR(found.status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), "/".join(parts))
        return [Node((*parts, name), file.status) for name, file in sorted(found.children.items())]

    def open(self, parts: Sequence[str]) -> BinaryIO:
        """Open the regular file at `parts`; see `FileRoot.open`."""
        file = self._find(parts)
        return cast(BinaryIO, _Content(self._descriptor, file.status.st_size, file.regions))

    def regions(self, parts: Sequence[str], /) -> Regions | None:
        """Return where the regular file at `parts` has data; see `FileRoot.regions`."""
        file = self._find(parts)
        stored = sum(length for _, length, _ in file.regions)
        return (
            None
            if stored == file.status.st_size
            else tuple((start, length) for start, length, _ in file.regions)
        )

    def stored(self, parts: Sequence[str], /) -> Iterator[bytes]:
        """Yield the data of the regular file at `parts`; see `FileRoot.stored`."""
        for _, length, place in self._find(parts).regions:
            at, end = place, place + length
            while at < end:
                piece = os.pread(self._descriptor, min(end - at, CHUNK_BYTES), at)
                if not piece:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                yield piece
                at += len(piece)

    def attributes(self, parts: Sequence[str]) -> Mapping[str, bytes]:
        """Return the extended attributes of what is at `parts`; see `FileRoot.attributes`."""
        return self._find(parts).attributes

    def _find(self, parts: Sequence[str]) -> _File:
        file = self._top
        for name in parts:
            below = file.children.get(name)
            if below is None:
                code = errno.ENOENT if stat.S_ISDIR(file.status.st_mode) else errno.ENOTDIR
                raise OSError(code, os.strerror(code), "/".join(parts))
            file = below
        return file

    def _read(self, layer: LayerReader) -> None:
        for number, entry in enumerate(layer, 1):
            parts = tuple(entry.path.split("/")) if entry.path else ()
            if not parts and entry.kind != DIRECTORY:
                continue  # no tool of ours writes it, and it has no place
            if entry.kind == HARDLINK:
                self._hard_link(parts, entry)
                continue
            file = _file(entry, layer.position, number)
            if not parts:
                self._top.status = file.status
                continue
            above = self._directory(parts[:-1])
            old = above.children.get(parts[-1])
            if old is not None and entry.kind == DIRECTORY:
                file.children = old.children
            above.children[parts[-1]] = file

    def _hard_link(self, parts: Parts, entry: Entry) -> None:
        file = self._find(entry.linkname.split("/") if entry.linkname else ())
        if stat.S_ISDIR(file.status.st_mode):
            # It could contain itself, and a walk would never end.
            raise DamagedArchive(f"{entry.path!r:.200} is a hard link to a directory")
        if parts:
            # More than one name: a copy of both makes one file of them again.
            old = file.status
            file.status = _status(
                old.st_mode,
                (old.st_uid, old.st_gid),
                size=old.st_size,
                mtime=old.st_mtime_ns,
                number=old.st_ino,
                links=2,
                device=old.st_rdev,
            )
            self._directory(parts[:-1]).children[parts[-1]] = file

    def _directory(self, parts: Parts) -> _File:
        """Return the directory `parts`; an archive need not list those that it needs."""
        file = self._top
        for name in parts:
            below = file.children.get(name)
            if below is None or not stat.S_ISDIR(below.status.st_mode):
                below = file.children[name] = _File(_status(stat.S_IFDIR | 0o755))
            file = below
        return file


class _Content(io.RawIOBase):
    """A regular file of the archive, its holes included."""

    def __init__(self, descriptor: int, size: int, regions: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size = size
        self._regions = regions
        self._index = 0
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        start, length, place = self._region()
        if self._at < start:
            count = min(len(view), start - self._at)
            view[:count] = bytes(count)
        else:
            passed = self._at - start
            count = min(len(view), length - passed)
            count = os.preadv(self._descriptor, [view[:count]], place + passed) if count else 0
        self._at += count
        return count

    def _region(self) -> tuple[int, int, int]:
        """Return the region that is at the current place, or the next one; at the end an empty one."""
        while self._index < len(self._regions):
            region = self._regions[self._index]
            if self._at < region[0] + region[1]:
                return region
            self._index += 1
        return self._size, 0, 0


def _file(entry: Entry, place: int, number: int) -> _File:
    kind = _KINDS[entry.kind]
    owner = (entry.uid, entry.gid)
    device = os.makedev(*entry.device)
    status = _status(
        kind | entry.mode, owner, size=entry.size, mtime=entry.mtime_ns, number=number, device=device
    )
    regions: list[tuple[int, int, int]] = []
    if kind == stat.S_IFREG:
        for start, length in entry.regions if entry.regions is not None else ((0, entry.size),):
            regions.append((start, length, place))
            place += length
    return _File(status, entry.linkname, tuple(regions), kept(entry.xattrs))


def _status(
    mode: int,
    owner: tuple[int, int] = (0, 0),
    *,
    size: int = 0,
    mtime: int = 0,
    number: int = 0,
    links: int = 1,
    device: int = 0,
) -> os.stat_result:
    # Three times in seconds, in fractions of them, in nanoseconds; size and number of blocks.
    times = (*(mtime // 10**9,) * 3, *(mtime / 1e9,) * 3, *(mtime,) * 3)
    return os.stat_result((mode, number, 0, links, *owner, size, *times, 0, 0, device))
