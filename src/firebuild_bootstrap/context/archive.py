"""Archives that ADD unpacks: recognised by their content, sent member by member.

What counts as an archive is in the Dockerfile reference under "ADD: Adding local tar archives". Members
go out in the archive's order, straight from the compressed stream; nothing is unpacked on the host.
Extended attributes and access lists are not sent.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, BinaryIO, Final

from firebuild_bootstrap.context.entries import Entry, EntryKind
from firebuild_bootstrap.context.reading import checked
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.tarball import (
    DAMAGE,
    DamagedArchive,
    TarReader,
    decompressed,
    mtime_ns,
    starts_like_tar,
)

_BROKEN: Final[tuple[type[Exception], ...]] = (*DAMAGE, OSError)
_LAST_ID: Final = 2**32 - 2  # -1 means "leave it" (chown(2))


def is_archive(content: io.BufferedReader) -> bool:
    """Tell whether `content` starts like a tar archive, plain or compressed with gzip, bzip2, xz or zstd.

    A compressed file of anything else, and an archive without members, are plain files.
    """
    try:
        return starts_like_tar(decompressed(content).read(tarfile.BLOCKSIZE))
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

    def _next(self, reader: _Reader) -> tarfile.TarInfo | None:
        try:
            return reader.next()
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _drain(self, reader: _Reader) -> None:
        try:
            reader.tar.drain()
        except _BROKEN as error:
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
            mode=member.mode & 0o7777 if path else 0o755,
            mtime_ns=mtime_ns(member),
            from_directory=True,
            size=member.size if kind is EntryKind.FILE else 0,
            link_target=link_target,
            owner=self._owner(member) if path else (0, 0),
            member=True,
            open=partial(self._open, reader, index, member) if kind is EntryKind.FILE else None,
        )

    def _owner(self, member: tarfile.TarInfo) -> tuple[int, int]:
        if not all(0 <= number <= _LAST_ID for number in (member.uid, member.gid)):
            raise self._error(f"{member.name!r} has the owner {member.uid}:{member.gid}, which no system has")
        return member.uid, member.gid

    def _open(self, reader: _Reader, index: int, member: tarfile.TarInfo) -> BinaryIO:
        if reader.index == index and not reader.opened:
            reader.opened = True
            return self._content(reader.tar, member, lambda: None)
        # The stream has moved on: read the archive again up to this member.
        file = self.open()
        try:
            again = _Reader.of(file)
            while again.index < index:
                member = again.next() or member
        except _BROKEN as error:
            file.close()
            raise self._damaged(error) from error
        return self._content(again.tar, member, file.close)

    def _content(self, tar: TarReader, member: tarfile.TarInfo, close: Callable[[], None]) -> BinaryIO:
        return checked(
            _Member(tar.content(member), close),
            member.size,
            name=f"{member.name!r} of the archive {self.name!r}",
            location=self.location,
            broken=_BROKEN,
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
        how = "it is damaged" if isinstance(error, DamagedArchive) else "it can't be read"
        return self._error(f"{how}: {error}")

    def _error(self, problem: str) -> InputError:
        return InputError(
            f"the archive {self.name!r} can't be unpacked: {problem}",
            hint="repair the archive, or use COPY to put it into the image as it is",
            location=self.location,
        )


@dataclass
class _Reader:
    """An archive and where it stands: `index` counts members from 0."""

    tar: TarReader
    index: int = -1
    opened: bool = False

    @classmethod
    def of(cls, archive: io.BufferedReader) -> _Reader:
        return cls(TarReader(decompressed(archive)))

    def next(self) -> tarfile.TarInfo | None:
        member = self.tar.next()
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
