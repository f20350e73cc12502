"""Archives that ADD unpacks: recognised by their content, sent member by member.

What counts as an archive is in the Dockerfile reference under "ADD: Adding local tar archives". Members
go out in the archive's order, straight from the compressed stream; nothing is unpacked on the host.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, Final

from firebuild_bootstrap.context.entries import Entry, checked, kept
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.compression import decompressed
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader, starts_like_tar
from firebuild_bootstrap.layers.tar import BLOCK, PIECE
from firebuild_bootstrap.layers.tar import Entry as Member
from firebuild_bootstrap.wire import MAX_ID
from firebuild_pki.values import dataclass

_BROKEN: Final[tuple[type[Exception], ...]] = (DamagedArchive, OSError)


def is_archive(content: io.BufferedReader) -> bool:
    """Tell whether `content` starts like a tar archive, plain or compressed with gzip, bzip2, xz or zstd.

    A compressed file of anything else, and an archive without members, are plain files.
    """
    try:
        return starts_like_tar(decompressed(content).read(BLOCK))
    except _BROKEN:
        return False


@dataclass(frozen=True)
class Archive:
    """A tar archive whose members become entries.

    Args:
        name: what to call it in messages.
        open: opens the archive file itself, as often as needed.
        location: the instruction that adds it.
    """

    name: str
    open: Callable[[], io.BufferedReader]
    location: Location | None

    def entries(self) -> Iterator[Entry]:
        """Yield the members in their order. Open their content in that order too: going back is slow.

        The archive's own root directory, if it has one, says nothing about the destination, which is made
        with 0755 and for root as by BuildKit.

        Raises:
            InputError: the archive is damaged, or a member would leave the destination or is a device.
        """
        names: set[str] = set()
        with self._reading() as reader:
            while (member := self._next(reader)) is not None:
                entry = self._entry(reader, member, names)
                names.add(entry.path)
                yield entry
            self._drain(reader)

    @contextmanager
    def _reading(self) -> Iterator[_Reader]:
        with self.open() as file:
            try:
                reader = _Reader.of(file)
            except _BROKEN as error:
                raise self._damaged(error) from error
            try:
                yield reader
            finally:
                reader.index = -1

    def _next(self, reader: _Reader) -> Member | None:
        try:
            return reader.next()
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _drain(self, reader: _Reader) -> None:
        try:
            reader.layer.drain()
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _entry(self, reader: _Reader, member: Member, names: set[str]) -> Entry:
        name = reader.layer.name
        path = self._text(member.path, name)
        kind = member.kind
        if not path and kind != tar.DIRECTORY:
            raise self._error(f"{name!r} is its root directory, but not as a directory")
        if kind == tar.HARDLINK and member.linkname not in names:
            raise self._error(f"{name!r} is a hard link to {member.linkname!r}, which is not before it")
        index = reader.index
        return Entry(
            source=f"{self.name}: {self._text(name, name)}",
            path=path,
            kind=kind,
            mode=member.mode if path else 0o755,
            mtime_ns=member.mtime_ns,
            from_directory=True,
            size=member.size,
            link_target=self._text(member.linkname, name),
            owner=self._owner(member, name) if path else (0, 0),
            member=True,
            open=partial(self._open, reader, index, member) if kind == tar.FILE else None,
            regions=member.regions,
            device=member.device,
            attributes=kept(member.xattrs) if member.xattrs else None,
        )

    def _owner(self, member: Member, name: str) -> tuple[int, int]:
        if not all(0 <= number <= MAX_ID for number in (member.uid, member.gid)):
            raise self._error(f"{name!r} has the owner {member.uid}:{member.gid}, which no system has")
        return member.uid, member.gid

    def _open(self, reader: _Reader, index: int, member: Member) -> BinaryIO:
        if reader.index == index and not reader.opened:
            reader.opened = True
            return self._content(reader.layer, member, lambda: None)
        # The stream has moved on: read the archive again up to this member.
        file = self.open()
        try:
            again = _Reader.of(file)
            while again.index < index:
                member = again.next() or member
        except _BROKEN as error:
            file.close()
            raise self._damaged(error) from error
        return self._content(again.layer, member, file.close)

    def _content(self, layer: LayerReader, member: Member, close: Callable[[], None]) -> BinaryIO:
        return checked(
            _Content(layer, member.size, close),
            member.size,
            name=f"{layer.name!r} of the archive {self.name!r}",
            location=self.location,
            broken=_BROKEN,
        )

    def _text(self, text: str, name: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._error(f"{name!r}: names in it have to be UTF-8") from error
        return text

    def _damaged(self, error: Exception) -> InputError:
        how = "it is damaged" if isinstance(error, DamagedArchive) else "it can't be read"
        return self._error(f"{how}: {error}")

    def _error(self, problem: str) -> InputError:
        return InputError(
            f"the archive {self.name!r} can't be unpacked: {problem}",
            hint="repair the archive, or use COPY to put it into the image as it is",
            location=self.location,
        )


@dataclass(frozen=False)
class _Reader:
    """An archive and where it stands: `index` counts members from 0."""

    layer: LayerReader
    index: int = -1
    opened: bool = False

    @classmethod
    def of(cls, archive: io.BufferedReader) -> _Reader:
        return cls(LayerReader(decompressed(archive)))

    def next(self) -> Member | None:
        member = next(self.layer, None)
        self.index += 1
        self.opened = False
        return member


class _Content:
    """The content of the current member with its holes; closing it closes what was opened for it alone."""

    def __init__(self, layer: LayerReader, size: int, release: Callable[[], None]) -> None:
        self._pieces = layer.pieces()
        self._piece = memoryview(b"")
        self._begin = 0  # of the piece
        self._at = 0
        self._size = size
        self.close = release

    def read(self, size: int, /) -> bytes:
        if not self._piece and self._begin <= self._at < self._size:
            self._begin, self._piece = next(self._pieces, (self._size, memoryview(b"")))
        if self._at < self._begin:
            data = bytes(min(size, self._begin - self._at, PIECE))
        else:
            data = bytes(self._piece[:size])
            self._piece = self._piece[len(data) :]
            self._begin += len(data)
        self._at += len(data)
        return data
