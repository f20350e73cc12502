"""What one COPY or ADD sends to an old guest: pieces for a directory of their own, in portions.

An old guest keeps all files of one resource in memory until the last one is written, overwrites without
truncation and cannot make links. So files are cut into pieces, sent in portions, as new files with names
of no meaning where names could do harm; the script in placing.py makes them what they have to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from firebuild_bootstrap.context.entries import Entry, EntryKind

PORTION_BYTES: Final = 16 * 1024 * 1024
_PORTION_PIECES: Final = 2000
_LINKS: Final = (EntryKind.SYMLINK, EntryKind.HARDLINK)


@dataclass(frozen=True)
class Piece:
    """One thing that the guest writes: a directory, or a piece of a file.

    Args:
        path: where, below the staging directory; empty for that directory itself.
        entry: number of the file among all entries, -1 for a directory.
        size: bytes of the piece.
        last: the file ends with it.
    """

    path: str
    entry: int = -1
    size: int = 0
    last: bool = False


@dataclass
class Layer:
    """Entries that can lie in one directory before they are merged into the destination.

    `single` is set where the layer is one file that the destination's rules name or place, `archive` where
    its entries are members of one. `entries` holds each path once; `None` stands for a directory that the
    source does not mention.
    """

    number: int
    single: bool
    archive: bool
    entries: dict[str, tuple[int, Entry] | None] = field(default_factory=dict)

    def takes(self, entry: Entry) -> bool:
        """Tell whether the entry can be added without meeting another one in the layer."""
        if self.single or not entry.from_directory or entry.member != self.archive:
            return False
        held = self.entries.get(entry.path)
        if held is not None or (entry.path in self.entries and entry.kind is not EntryKind.DIRECTORY):
            return False
        above = (self.entries.get(path) for path in parents(entry.path))
        return all(found is None or found[1].kind is EntryKind.DIRECTORY for found in above)

    def add(self, index: int, entry: Entry) -> None:
        """Add an entry, and the directories above it that were not mentioned."""
        if not self.single:
            for path in parents(entry.path):
                self.entries.setdefault(path, None)
        if self.archive and not entry.path:
            self.entries.setdefault("", None)  # an archive says nothing about the destination itself
        else:
            self.entries[entry.path] = (index, entry)

    def staged(self, path: str) -> str:
        """Return where an entry waits, relative to the staging directory."""
        return str(self.number) if self.single or not path else f"{self.number}/{path}"


def parents(path: str) -> Iterator[str]:
    """Yield the directories above a path of an entry, outermost first; the first is the destination."""
    if not path:
        return
    yield ""
    names = path.split("/")[:-1]
    for count in range(1, len(names) + 1):
        yield "/".join(names[:count])


def layers(entries: Iterable[Entry]) -> list[Layer]:
    """Sort entries into layers, in their order; merged one after the other they give the same result."""
    found: list[Layer] = []
    for index, entry in enumerate(entries):
        if not found or not found[-1].takes(entry):
            found.append(Layer(len(found), single=not entry.from_directory, archive=entry.member))
        found[-1].add(index, entry)
    return found


@dataclass(frozen=True)
class File:
    """A regular file under way: its number and entry, where it has to be, and what it is sent as."""

    index: int
    entry: Entry
    staged: str
    pieces: tuple[Piece, ...]

    @property
    def arrived(self) -> str:
        """Where it is when its content is checked."""
        return self.pieces[0].path if len(self.pieces) == 1 else _harmless(self.index, self.staged)


def files(found: Iterable[Layer]) -> list[File]:
    """Return all regular files in the order of their entries."""
    result = []
    for layer in found:
        for path, held in layer.entries.items():
            if held is not None and held[1].kind is EntryKind.FILE:
                index, entry = held
                staged = layer.staged(path)
                result.append(File(index, entry, staged, tuple(_pieces(index, entry.size, staged))))
    return sorted(result, key=lambda file: file.index)


def _pieces(index: int, size: int, staged: str) -> Iterator[Piece]:
    if size <= PORTION_BYTES:
        yield Piece(_harmless(index, staged), index, size, last=True)
        return
    for offset in range(0, size, PORTION_BYTES):
        rest = size - offset
        yield Piece(
            f"part{index}.{offset // PORTION_BYTES}",
            index,
            min(rest, PORTION_BYTES),
            last=rest <= PORTION_BYTES,
        )


def _harmless(index: int, staged: str) -> str:
    # sha256sum writes line feeds and backslashes in a way of its own; busybox does not read it.
    return staged if staged.isprintable() and "\\" not in staged else f"odd{index}"


def directories(found: Iterable[Layer]) -> list[Piece]:
    """Return the directories that have to exist before any file is sent, parents first."""
    paths = [
        layer.staged(path)
        for layer in found
        if not layer.single
        for path, held in layer.entries.items()
        if held is None or held[1].kind is EntryKind.DIRECTORY
    ]
    # A mentioned directory may come after one that its child made necessary.
    return [Piece(""), *(Piece(path) for path in sorted(paths, key=lambda path: path.count("/")))]


def portions(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Cut the pieces into what one resource carries; at least one, which may be empty."""
    found: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if found[-1] and (size + piece.size > PORTION_BYTES or len(found[-1]) >= _PORTION_PIECES):
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.size
    return found
