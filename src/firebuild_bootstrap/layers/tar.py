"""What travels: the entry of a layer, and the one writer of tar archives.

The form is the PAX interchange format (POSIX.1-2017, pax, "pax Interchange Format") with the whiteouts of the
OCI image specification (layer.md). It is canonical: the same entries give the same bytes on every machine and
every Python. Standard library only, and little of it: vminit imports this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, Protocol

BLOCK: Final = 512
PIECE: Final = 1024 * 1024
"""Bytes of content that are moved at once."""
HOLE_BYTES: Final = 64 * 1024
"""Holes are whole stretches of this many zeros, counted from the beginning of the file.

They go by content: where a file system has holes depends on its block size and on how the file was written,
and the same files have to give the same bytes everywhere.
"""

FILE: Final = "file"
DIRECTORY: Final = "directory"
SYMLINK: Final = "symlink"
HARDLINK: Final = "hardlink"
FIFO: Final = "fifo"
CHARACTER: Final = "character"
BLOCK_DEVICE: Final = "block"
WHITEOUT: Final = "whiteout"
OPAQUE: Final = "opaque"
Kind = Literal["file", "directory", "symlink", "hardlink", "fifo", "character", "block", "whiteout", "opaque"]

WHITEOUT_PREFIX: Final = ".wh."
OPAQUE_NAME: Final = ".wh..wh..opq"
XATTR: Final = "SCHILY.xattr."
"""What the names of extended attributes begin with; GNU tar, bsdtar, star and Go agree on it."""
_ESCAPED: Final = re.compile("=|%(?=25|3D)")
_ESCAPE: Final = re.compile("%(25|3D)")

Regions = tuple[tuple[int, int], ...]
"""Where a file has data: (offset, length) in bytes, in order and apart; everything else is a hole."""

_NO_XATTRS: Final[Mapping[str, bytes]] = MappingProxyType({})
_TYPES: Final[Mapping[Kind, bytes]] = {
    FILE: b"0",
    HARDLINK: b"1",
    SYMLINK: b"2",
    CHARACTER: b"3",
    BLOCK_DEVICE: b"4",
    DIRECTORY: b"5",
    FIFO: b"6",
    WHITEOUT: b"0",
    OPAQUE: b"0",
}
_OCTAL_7: Final = 8**7  # numbers that do not fit into seven octal digits
_OCTAL_11: Final = 8**11
_BUFFERED: Final = 256 * 1024
_SECOND: Final = 10**9
_MAGIC: Final = b"ustar\x0000" + bytes(64) + b"0000000\x000000000\0" + bytes(167)
_EXTENDED: Final = b"././@PaxHeader"
_NAMES: Final = frozenset(("path", "linkpath", "GNU.sparse.name"))
MAX_REGIONS: Final = 500_000
"""Parts with data that one file may have: their list is in memory."""


class LayerError(Exception):
    """A tree or an archive is not as it should be.

    Args:
        message: what was expected and found.
        hint: what to do about it.
        asked: the user asked for something that can't be; otherwise the machine could not do it.
    """

    def __init__(self, message: str, hint: str = "", *, asked: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.asked = asked


class Entry(NamedTuple):
    """One file of a tree, or one change to it. (A tuple, because a layer has tens of thousands.)

    Args:
        path: below the root, without a leading slash; empty for the root itself. Bytes that are not UTF-8 are
            kept as `os.fsdecode` keeps them.
        kind: what it is. `whiteout` removes what is at `path` in the layers below, `opaque` everything in
            the directory `path`.
        mode: 0 to 0o7777.
        uid: owner by number.
        gid: group by number.
        mtime_ns: modification time, nanoseconds since 1970.
        size: bytes of a regular file, holes included.
        linkname: the text of a symbolic link; of a hard link, the path of the name it had before.
        device: major and minor number of a device node.
        xattrs: extended attributes by name.
        regions: where a regular file has data; None where it has no holes.
    """

    path: str
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    linkname: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = _NO_XATTRS
    regions: Regions | None = None

    @property
    def stored(self) -> int:
        """Bytes of content that travel."""
        if self.kind != FILE:
            return 0
        return self.size if self.regions is None else sum(length for _, length in self.regions)


class Sink(Protocol):
    """Where a layer goes."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Take all of `data`, and keep no reference to it: the memory is used again."""


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` to a descriptor, of which write(2) may take a part at a time.

    Raises:
        OSError: it can't be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class _Writable(Protocol):
    """A file, which may take a part of what it is given."""

    def write(self, data: memoryview, /) -> int: ...


class Hashed:
    """A `Sink` that hashes what it is given, and writes it to `file` if there is one."""

    def __init__(self, file: _Writable | None = None) -> None:
        import hashlib  # vminit, which imports this module, hashes nothing

        self._hash = hashlib.sha256()
        self._file = file

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """See `Sink`."""
        self._hash.update(data)
        rest = memoryview(data)
        while self._file is not None and rest:
            rest = rest[self._file.write(rest) :]

    @property
    def digest(self) -> str:
        """`sha256:…` of everything written."""
        return f"sha256:{self._hash.hexdigest()}"


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes | memoryview:
        """Return at most `size` bytes, and none only at the end."""


Content = bytes | bytearray | memoryview | int | Readable
"""The content of a file: what is stored of it (the data of its regions, one after the other), as bytes or as
a stream; or the descriptor of the file itself, which is read at the offsets of its regions."""


class LayerWriter:
    """Writes entries as a tar archive, byte for byte the same for the same entries.

    Canonical order is the caller's part: see `tree_entries`.

    Args:
        out: gets the archive in pieces of up to 1 MiB.
    """

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._buffer = bytearray()
        self._piece: memoryview | None = None
        self.entries = 0
        """Number of entries written."""
        self.size = 0
        """Bytes written, those that still wait in memory included."""

    def add(self, entry: Entry, content: Content = b"") -> None:
        """Write one entry.

        Args:
            entry: its `size` and `regions` fit its content.
            content: of a regular file.

        Raises:
            LayerError: the content is shorter than announced (it changed while it was read), or the entry is
                nothing that an archive can hold.
            OSError: `out` or the content failed.
        """
        stored = entry.stored
        head, table = encode(entry, stored)
        self._buffer += head
        self.size += len(head)
        self.entries += 1
        if entry.kind == FILE and stored:
            self._content(entry, content, stored)
            padding = -(stored + table) % BLOCK
            self._buffer += bytes(padding)
            self.size += stored + padding
        if len(self._buffer) >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Hand everything written so far to `out`."""
        if self._buffer:
            self._out.write(self._buffer)
            self._buffer = bytearray()

    def close(self) -> None:
        """Write the end mark; `out` stays open."""
        self._buffer += bytes(2 * BLOCK)
        self.size += 2 * BLOCK
        self.flush()

    def _content(self, entry: Entry, content: Content, stored: int) -> None:
        if isinstance(content, int):
            for offset, length in entry.regions if entry.regions is not None else ((0, entry.size),):
                self._file(entry.path, content, offset, length)
            return
        if not isinstance(content, bytes | bytearray | memoryview):
            while stored:
                data = content.read(min(stored, PIECE))
                stored -= len(data)
                self._data(data)
                if not data:
                    raise changed(entry.path)
        elif len(content) == stored:
            self._data(content)
        else:
            raise changed(entry.path)

    def _file(self, path: str, descriptor: int, offset: int, length: int) -> None:
        while length:
            if length <= _BUFFERED:
                data: bytes | memoryview = os.pread(descriptor, length, offset)
            else:
                # One piece of memory for all: new megabytes for each read cost more than the reading.
                self._piece = self._piece or memoryview(bytearray(PIECE))
                data = self._piece[: os.preadv(descriptor, [self._piece[:length]], offset)]
            if not data:
                raise changed(path)
            self._data(data)
            offset += len(data)
            length -= len(data)

    def _data(self, data: bytes | bytearray | memoryview) -> None:
        if len(data) >= _BUFFERED:
            self.flush()
            self._out.write(data)
            return
        self._buffer += data
        if len(self._buffer) >= _BUFFERED:
            self.flush()


def encode(entry: Entry, stored: int) -> tuple[bytes, int]:
    """Return everything of an entry that comes before its content, and how much of that counts as content.

    Raises:
        LayerError: it can't be in an archive.
    """
    records: dict[str, bytes] = {XATTR + escaped(name): value for name, value in entry.xattrs.items()}
    table = b""
    name = _name(entry)
    if entry.regions is not None:
        table = _sparse(entry, name, records)
        parent, _, base = name.rpartition(b"/")
        # Where it ends up with a tar that does not know these records (GNU tar, "Storing Sparse Files").
        name = (parent + b"/" if parent else b"") + b"GNUSparseFile.0/" + base
    link = os.fsencode(entry.linkname) if entry.linkname else b""
    name = _text(records, "path", name)
    link = _text(records, "linkpath", link)
    uid = _number(records, "uid", entry.uid, _OCTAL_7)
    gid = _number(records, "gid", entry.gid, _OCTAL_7)
    size = _number(records, "size", len(table) + stored, _OCTAL_11)
    seconds, fraction = divmod(entry.mtime_ns, _SECOND)
    if fraction or not 0 <= seconds < _OCTAL_11:
        whole, fraction = divmod(abs(entry.mtime_ns), _SECOND)
        sign = "-" if entry.mtime_ns < 0 else ""
        text = f"{sign}{whole}.{fraction:09d}".rstrip("0").rstrip(".")
        records["mtime"] = text.encode()
        seconds = min(max(seconds, 0), _OCTAL_11 - 1)
    head = _header(name, _TYPES[entry.kind], (entry.mode, uid, gid, size, seconds), link, entry.device)
    if records:
        head = _extended(records) + head
    return head + table, len(table)


def escaped(attribute: str) -> str:
    """Return the name of an extended attribute as a record has it, whose own name ends with the first `=`.

    As GNU tar's xattr_encode_keyword does it, but for a `%` that nobody takes for an escape: that stays.
    """
    return _ESCAPED.sub(lambda found: "%3D" if found[0] == "=" else "%25", attribute)


def unescaped(name: str) -> str:
    """Return the name of an extended attribute from that of its record; the reverse of `escaped`."""
    return _ESCAPE.sub(lambda found: "=" if found[1] == "3D" else "%", name) if "%" in name else name


def _name(entry: Entry) -> bytes:
    path = entry.path
    if entry.kind == DIRECTORY:
        path = f"{path}/" if path else "./"
    elif entry.kind == OPAQUE:
        path = f"{path}/{OPAQUE_NAME}" if path else OPAQUE_NAME
    elif entry.kind == WHITEOUT:
        parent, slash, name = path.rpartition("/")
        path = f"{parent}{slash}{WHITEOUT_PREFIX}{name}"
    if "\0" in path or "\0" in entry.linkname or not path:
        raise LayerError(f"{entry.path!r} can't be the name of a file")
    return os.fsencode(path)


def _sparse(entry: Entry, name: bytes, records: dict[str, bytes]) -> bytes:
    """Return the table of a file with holes and add its records: GNU sparse format 1.0."""
    regions = list(entry.regions or ())
    if len(regions) > MAX_REGIONS:
        raise LayerError(f"/{entry.path} has more than {MAX_REGIONS} holes", "write it without holes")
    if not regions or sum(regions[-1]) < entry.size:
        regions.append((entry.size, 0))  # as GNU tar does, for readers that go by the last region
    records["GNU.sparse.major"] = b"1"
    records["GNU.sparse.minor"] = b"0"
    records["GNU.sparse.name"] = name
    records["GNU.sparse.realsize"] = b"%d" % entry.size
    table = b"%d\n" % len(regions) + b"".join(b"%d\n%d\n" % region for region in regions)
    return table + bytes(-len(table) % BLOCK)


def _text(records: dict[str, bytes], keyword: str, text: bytes) -> bytes:
    """Return what of a text goes into the header; where that is not all of it, the whole is a record."""
    if len(text) <= 100 and text.isascii():
        return text
    records[keyword] = text
    return text[:100]


def _number(records: dict[str, bytes], keyword: str, number: int, limit: int) -> int:
    if 0 <= number < limit:
        return number
    records[keyword] = b"%d" % number
    return 0


def _extended(records: Mapping[str, bytes]) -> bytes:
    """Return an extended header with `records`, in the order of their names."""
    lines = [_record(name, records[name]) for name in sorted(records)]
    if not (_NAMES.isdisjoint(records) or all(_is_utf8(records[name]) for name in _NAMES & records.keys())):
        lines.insert(0, _record("hdrcharset", b"BINARY"))
    data = b"".join(lines)
    return _extended_header(len(data)) + data + bytes(-len(data) % BLOCK)


@lru_cache(256)
def _extended_header(size: int) -> bytes:
    return _header(_EXTENDED, b"x", (0o644, 0, 0, size, 0))


def _record(name: str, value: bytes) -> bytes:
    """Return `LENGTH NAME=VALUE\\n`, where the length counts its own digits too."""
    line = b" " + os.fsencode(name) + b"=" + value + b"\n"
    length = len(line) + len(str(len(line)))
    length = len(line) + len(str(length))
    return b"%d" % length + line


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header(
    name: bytes,
    kind: bytes,
    numbers: tuple[int, int, int, int, int],
    link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:
    """Return a header; `numbers` are mode, uid, gid, size and seconds of the modification time."""
    head = b"%b%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), *numbers)
    tail, sum_of_tail = _tail(kind, link, device)
    return head + b"%06o\0 " % (checksum(head) + sum_of_tail + 256) + tail


@lru_cache(256)  # of files, all are alike
def _tail(kind: bytes, link: bytes, device: tuple[int, int]) -> tuple[bytes, int]:
    """Return what follows the checksum in a header, and its part of the checksum."""
    tail = kind + link.ljust(100, b"\0") + _MAGIC
    if device != (0, 0):
        tail = tail[:173] + b"%07o\0%07o\0" % device + bytes(167)
    return tail, checksum(tail)


def checksum(data: bytes) -> int:
    """Return the sum of all bytes; leaving out the zeros, most of a header, takes a quarter of the time."""
    return sum(data.translate(None, b"\0"))


def write_layer(out: Sink, files: Iterable[tuple[Entry, Content]]) -> LayerWriter:
    """Write all of `files` as one archive and return its finished writer, which knows size and number."""
    writer = LayerWriter(out)
    for entry, content in files:
        writer.add(entry, content)
    writer.close()
    return writer


def changed(path: str) -> LayerError:
    """Return the error for a file that is not what it was a moment ago."""
    return LayerError(f"/{path} changed while it was read", "leave the files alone while they are in use")
