"""Archives that ADD unpacks: recognised by their content, sent member by member.

What counts as an archive is in the Dockerfile reference under "ADD: Adding local tar archives". Members
go out in the archive's order, straight from the compressed stream; nothing is unpacked on the host.
Extended attributes and access lists are not sent.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import IO, BinaryIO, Final, cast

import zstandard

from firebuild_bootstrap.context.entries import Entry, EntryKind
from firebuild_bootstrap.context.reading import checked
from firebuild_bootstrap.errors import InputError, Location

_BLOCK: Final = tarfile.BLOCKSIZE
_MAGIC_BYTES: Final = 6
_PIECE: Final = 1024 * 1024


class _BrokenHeader(Exception):
    """A header in the middle of the archive is no header; `tarfile` would take it for the end."""


_DAMAGE: Final[tuple[type[Exception], ...]] = (
    _BrokenHeader,
    tarfile.TarError,
    lzma.LZMAError,
    zstandard.ZstdError,
    zlib.error,
    EOFError,
    OSError,
    # What tarfile lets through for absurd numbers in extended headers.
    ValueError,
    IndexError,
    OverflowError,
)


def _unzstd(compressed: BinaryIO) -> IO[bytes]:
    return zstandard.ZstdDecompressor().stream_reader(compressed, read_across_frames=True)


_DECOMPRESSORS: Final[dict[bytes, Callable[[BinaryIO], IO[bytes]]]] = {
    b"\x1f\x8b": lambda compressed: cast("IO[bytes]", gzip.GzipFile(fileobj=compressed)),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _unzstd,
}


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not buf.strip(b"\0"):
                raise  # zeros, or nothing at all: the end of the archive
            raise _BrokenHeader(str(error)) from error


def _decompressed(archive: io.BufferedReader) -> IO[bytes]:
    start = archive.peek(_MAGIC_BYTES)
    for magic, decompress in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return decompress(archive)
    return archive


def is_archive(content: io.BufferedReader) -> bool:
    """Tell whether `content` starts like a tar archive, plain or compressed with gzip, bzip2, xz or zstd.

    A compressed file of anything else, and an archive without members, are plain files.
    """
    try:
        block = _decompressed(content).read(_BLOCK)
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except _DAMAGE:
        return False
    return True


@dataclass(frozen=True)
class Archive:
    """A tar archive whose members become entries.

    Args:
        name: what to call it in messages.
        open: opens the archive file itself, as often as needed.
        keep_owner: the members keep their numeric owners; otherwise the instruction's rule applies.
        location: the instruction that adds it.
    """

    name: str
    open: Callable[[], io.BufferedReader]
    keep_owner: bool
    location: Location | None

    def entries(self) -> Iterator[Entry]:
        """Yield the members in their order. Open their content in that order too: going back is slow.

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
            except _DAMAGE as error:
                raise self._damaged(error) from error
            try:
                yield reader
            finally:
                reader.index = -1

    def _next(self, reader: _Reader) -> tarfile.TarInfo | None:
        try:
            return reader.next()
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _drain(self, reader: _Reader) -> None:
        """Read what follows the last member: the checksum of a compressed file stands at its very end."""
        try:
            while reader.source.read(_PIECE):
                pass
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _entry(self, reader: _Reader, member: tarfile.TarInfo, names: set[str]) -> Entry:
        path = self._path(member.name, member)
        kind = self._kind(member)
        link_target = ""
        if kind is EntryKind.SYMLINK:
            link_target = self._text(member.linkname, member)
        elif kind is EntryKind.HARDLINK:
            link_target = self._path(member.linkname, member)
            if link_target not in names:
                raise self._error(
                    f"{member.name!r} is a hard link to {member.linkname!r}, which is not before it"
                )
        index = reader.index
        return Entry(
            source=f"{self.name}: {self._text(member.name, member)}",
            path=path,
            kind=kind,
            mode=member.mode & 0o7777,
            mtime_ns=_mtime_ns(member),
            from_directory=True,
            size=member.size if kind is EntryKind.FILE else 0,
            link_target=link_target,
            owner=(member.uid, member.gid) if self.keep_owner else None,
            open=partial(self._open, reader, index, member) if kind is EntryKind.FILE else None,
        )

    def _open(self, reader: _Reader, index: int, member: tarfile.TarInfo) -> BinaryIO:
        if reader.index == index and not reader.opened:
            reader.opened = True
            return self._content(reader.stream, member, lambda: None)
        # The stream has moved on: read the archive again up to this member.
        file = self.open()
        try:
            again = _Reader.of(file)
            while again.index < index:
                member = again.next() or member
        except _DAMAGE as error:
            file.close()
            raise self._damaged(error) from error
        return self._content(again.stream, member, file.close)

    def _content(
        self, stream: tarfile.TarFile, member: tarfile.TarInfo, close: Callable[[], None]
    ) -> BinaryIO:
        content = stream.extractfile(member) or io.BytesIO()
        return checked(
            _Member(content, close),
            member.size,
            name=f"{member.name!r} of the archive {self.name!r}",
            location=self.location,
            broken=_DAMAGE,
        )

    def _kind(self, member: tarfile.TarInfo) -> EntryKind:
        if member.isreg():
            return EntryKind.FILE
        if member.isdir():
            return EntryKind.DIRECTORY
        if member.issym():
            return EntryKind.SYMLINK
        if member.islnk():
            return EntryKind.HARDLINK
        what = "a FIFO" if member.isfifo() else "a device"
        raise self._error(f"{member.name!r} is {what}: only files, directories and links can be added")

    def _path(self, name: str, member: tarfile.TarInfo) -> str:
        path = posixpath.normpath(self._text(name, member).lstrip("/") or ".")
        if path == ".." or path.startswith("../"):
            raise self._error(f"{member.name!r} leads out of the archive (by {name!r})")
        return "" if path == "." else path

    def _text(self, text: str, member: tarfile.TarInfo) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._error(f"{member.name!r}: names in it have to be UTF-8") from error
        return text

    def _damaged(self, error: Exception) -> InputError:
        return self._error(f"it is damaged: {error}")

    def _error(self, problem: str) -> InputError:
        return InputError(
            f"the archive {self.name!r} can't be unpacked: {problem}",
            hint="repair the archive, or use COPY to put it into the image as it is",
            location=self.location,
        )


@dataclass
class _Reader:
    """A tar stream and where it stands: `index` counts members from 0."""

    stream: tarfile.TarFile
    source: IO[bytes]
    index: int = -1
    opened: bool = False

    @classmethod
    def of(cls, archive: io.BufferedReader) -> _Reader:
        source = _decompressed(archive)
        return cls(tarfile.open(fileobj=source, mode="r|", tarinfo=_Header, encoding="utf-8"), source)

    def next(self) -> tarfile.TarInfo | None:
        # Members are forgotten once passed, so that memory does not grow with the archive.
        self.stream.members = []  # type: ignore[attr-defined]
        member = self.stream.next()
        self.index += 1
        self.opened = False
        return member


@dataclass
class _Member:
    """The content of one member; closing it closes what was opened for it alone."""

    content: IO[bytes]
    release: Callable[[], None] = field(repr=False)

    def read(self, size: int, /) -> bytes:
        return self.content.read(size)

    def close(self) -> None:
        self.content.close()
        self.release()


def _mtime_ns(member: tarfile.TarInfo) -> int:
    try:
        return int(Decimal(member.pax_headers.get("mtime", "") or member.mtime) * 1_000_000_000)
    except (InvalidOperation, ValueError, OverflowError):
        return 0
