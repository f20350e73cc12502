"""The one reader of tar archives: strict, forward only, and bounded by what it is told.

It reads what people bring as well as what `LayerWriter` writes: ustar, V7, GNU with its long names and both
kinds of numbers, PAX, and sparse files in the old GNU format and in GNU.sparse 0.0, 0.1 and 1.0. What counts
as damage is decided here and not by the version of `tarfile`, which takes a header that is none for the end.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Final, NamedTuple

from .tar import (
    BLOCK,
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    MAX_REGIONS,
    OPAQUE,
    OPAQUE_NAME,
    PIECE,
    SYMLINK,
    WHITEOUT,
    WHITEOUT_PREFIX,
    XATTR,
    Entry,
    Kind,
    LayerError,
    Readable,
    Regions,
    checksum,
    unescaped,
)

FIRST_TIME_NS: Final = -(2**63)
LAST_TIME_NS: Final = 2**63 - 1

_LARGEST_FILE: Final = 2**63 - 1  # what off_t holds
_MAJORS, _MINORS = 1 << 12, 1 << 20  # of the kernel (linux/kdev_t.h)
_SECOND: Final = 10**9
_LONGEST_PATH: Final = 64 * 1024  # bytes; every step on it costs its length in those who walk it
_RECORDS: Final = 4096  # of one extended header; extended attributes are records
_CHAIN: Final = 32  # extended headers of one member; writers use four at most
_KINDS: Final[dict[bytes, Kind]] = {
    b"\0": FILE,  # V7
    b"0": FILE,
    b"7": FILE,  # "contiguous", which is a regular file today
    b"S": FILE,  # sparse, GNU
    b"1": HARDLINK,
    b"2": SYMLINK,
    b"3": CHARACTER,
    b"4": BLOCK_DEVICE,
    b"5": DIRECTORY,
    b"6": FIFO,
}
_RESERVED: Final = f"/{WHITEOUT_PREFIX}"
_GNU_LONG: Final = {b"L": "path", b"K": "linkpath"}
_TIME: Final = re.compile(rb"(-?)(\d{1,11})(?:\.(\d*))?")
_SPARSE_0_0: Final = ("GNU.sparse.offset", "GNU.sparse.numbytes")
_RAW: Final = struct.Struct("100s8s8s8s12s12s8s1s100s8s64s8s8s155s12x")


class DamagedArchive(LayerError):
    """An archive, or what it is compressed with, is not as its format wants it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "make or download it again")


class Limits(NamedTuple):
    """What an archive may hold at most.

    Args:
        entries: number of its entries.
        content: bytes of content, holes not counted.
        header: bytes of headers of one entry. The kernel's own limits for a path (4 KiB) and for all extended
            attributes of a file (64 KiB in ext4 and most others) leave room for many sparse regions.
    """

    entries: int = 2**63
    content: int = 2**63
    header: int = 16 * 1024 * 1024


NO_LIMITS: Final = Limits()
"""Only headers are bounded: for what the user brings and trusts to fit."""
LAYER_LIMITS: Final = Limits(entries=4_000_000, content=256 << 30)
"""For a layer of an image or a step, whoever made it: large ones have some hundred thousand files. Whoever
unpacks one has to remember something of each."""


class _Header(NamedTuple):
    """A header: its fields and its whole block, the size in it, and all records of extended headers."""

    raw: tuple[bytes, ...]
    block: bytes
    size: int
    records: dict[str, bytes]
    regions_0_0: list[bytes]


class LayerReader:
    """The entries of an archive, in their order.

    Iterate over it; the content of a file is there until the next step. A stream is read only as far as asked
    for, but for what its pieces hold.

    Args:
        source: an archive without compression, as a stream or as the descriptor of a file or pipe.
        limits: what it may hold.
        whiteouts: names that begin with `.wh.` are changes, as in the OCI image specification, and not files.

    Raises:
        DamagedArchive: all methods, where it is damaged, cut off, or larger than the limits; also where a
            name leads out of the tree. Errors of the source itself come as OSError.
    """

    def __init__(
        self, source: Readable | int, limits: Limits = NO_LIMITS, *, whiteouts: bool = False
    ) -> None:
        self._file_descriptor = -1  # of a regular file, whose content the kernel can copy
        if isinstance(source, int):
            self._read: Callable[[int], bytes | memoryview] = partial(os.read, source)
            if stat.S_ISREG(os.fstat(source).st_mode):
                self._file_descriptor = source
        else:
            # What a pipe holds now, and not only what fills the whole piece.
            self._read = getattr(source, "read1", source.read)
        self._limits = limits
        self.whiteouts = whiteouts
        self._data: bytes | memoryview = b""
        self._at = 0
        self._total = 0
        self._defaults: dict[str, bytes] = {}  # of a global extended header
        self._regions: list[tuple[int, int]] = []  # of the current file, not read yet
        self._passed = 0  # bytes of its stored content that follow its regions
        self._entries = 0
        self._content = limits.content
        self._budget = limits.header
        self._begun = False
        self.name = ""
        """The current entry's name as the archive has it."""
        self.marked = False
        """After the last entry: the archive has an end mark, as it should have."""

    def __iter__(self) -> Iterator[Entry]:
        return self

    def __next__(self) -> Entry:
        self._pass_content()
        entry = self._entry()
        if entry is None:
            raise StopIteration
        self._entries += 1
        if self._entries > self._limits.entries:
            raise DamagedArchive(f"it has more than {self._limits.entries} files")
        return entry

    # --- content ----------------------------------------------------------------------------------

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes of the stored content of the current file, b"" at its end."""
        return bytes(self._piece(size)[1]) if self._regions else b""

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the content of the current file, as (offset in the file, data); holes are left out."""
        while self._regions:
            yield self._piece(PIECE)

    def copy_to(self, descriptor: int, size: int) -> None:
        """Write the content of the current file into an empty file of `size` bytes; holes stay holes."""
        end = 0
        while self._regions:
            offset, length = self._regions[0]
            if self._file_descriptor >= 0 and self._at == len(self._data) and length >= PIECE:
                self._copy_in_kernel(descriptor, offset, length)
                end = offset + length
                del self._regions[0]
                continue
            offset, piece = self._piece(PIECE)
            end = offset + len(piece)
            while piece:
                written = os.pwrite(descriptor, piece, offset)
                piece, offset = piece[written:], offset + written
        if end < size:
            os.ftruncate(descriptor, size)

    @property
    def position(self) -> int:
        """Where the content that is not read yet begins, in bytes from the beginning of the archive."""
        return self._total - len(self._data) + self._at

    def drain(self) -> None:
        """Read what follows the end mark: the checksum of a compressed file stands at its very end."""
        self._data = b""
        while self._read(PIECE):
            pass

    def _piece(self, most: int) -> tuple[int, memoryview]:
        """Return what comes next of the regions that are left: where it belongs, and up to `most` bytes."""
        offset, length = self._regions[0]
        if self._at == len(self._data) and not self._fill(PIECE):
            raise DamagedArchive("unexpected end of data")
        size = min(length, most, len(self._data) - self._at)
        piece = memoryview(self._data)[self._at : self._at + size]
        self._at += size
        if size == length:
            del self._regions[0]
        else:
            self._regions[0] = (offset + size, length - size)
        return offset, piece

    def _copy_in_kernel(self, target: int, offset: int, length: int) -> None:
        os.lseek(target, offset, os.SEEK_SET)
        while length:
            # Unlike copy_file_range(2), this crosses file systems on every kernel.
            done = os.sendfile(target, self._file_descriptor, None, min(length, 1 << 30))
            if not done:
                raise DamagedArchive("unexpected end of data")
            self._total += done
            length -= done

    def _pass_content(self) -> None:
        missing = self._passed
        if self._regions:
            missing += sum(length for _, length in self._regions)
            self._regions = []
        self._passed = 0
        have = len(self._data) - self._at
        if missing <= have:
            self._at += missing
            return
        missing -= have
        self._data, self._at = b"", 0
        if self._file_descriptor >= 0 and missing > PIECE:
            try:
                os.lseek(self._file_descriptor, missing - 1, os.SEEK_CUR)
            except OSError as error:  # farther than any file system goes
                raise DamagedArchive("unexpected end of data") from error
            self._total += missing - 1
            missing = 1  # the last byte, which has to be there
        while missing:
            if not self._fill(PIECE):
                raise DamagedArchive("unexpected end of data")
            self._at = min(missing, len(self._data))
            missing -= self._at

    # --- headers ----------------------------------------------------------------------------------

    def _fill(self, size: int) -> bool:
        self._data = self._read(size)
        self._at = 0
        self._total += len(self._data)
        return bool(self._data)

    def _take(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the stream."""
        at = self._at
        if len(self._data) - at >= size:
            self._at = at + size
            return bytes(self._data[at : at + size])
        pieces = [self._data[at:]]
        size -= len(pieces[0])
        while size and self._fill(PIECE):
            pieces.append(self._data[:size])
            self._at = len(pieces[-1])
            size -= self._at
        return b"".join(pieces)

    def _extension(self, size: int) -> bytes:
        """Return the content of an extended header."""
        if size < 0 or size > self._budget:
            raise DamagedArchive("a header in it is too large")
        self._budget -= size
        padded = size + -size % BLOCK
        data = self._take(padded)
        if len(data) < padded:
            raise DamagedArchive("unexpected end of data")
        return data[:size]

    def _entry(self) -> Entry | None:
        self._budget = self._limits.header
        records: dict[str, bytes] = {}
        regions_0_0: list[bytes] = []
        for _ in range(_CHAIN):
            block = self._take(BLOCK)
            if len(block) < BLOCK or not (block[0] or block.strip(b"\0")):
                self._end(block, complete=not records)
                return None
            self._begun = True
            raw, kind, size = _fields(block)
            if kind in (b"x", b"X"):
                found, regions_0_0 = _records(self._extension(size))
                records.update(found)
            elif kind == b"g":
                self._defaults.update(_records(self._extension(size))[0])
            elif kind in _GNU_LONG:
                records[_GNU_LONG[kind]] = self._extension(size).partition(b"\0")[0]
            else:
                records = self._defaults | records if self._defaults else records
                return self._member(_Header(raw, block, size, records, regions_0_0))
        raise DamagedArchive(f"a file in it has more than {_CHAIN} extended headers")

    def _end(self, block: bytes, *, complete: bool) -> None:
        """Make sure that the archive ends here: with two blocks of zeros, or with the stream."""
        if not block and not self._begun:
            raise DamagedArchive("it is empty")
        if block.strip(b"\0"):
            raise DamagedArchive("a header in it is malformed")
        if not complete:
            raise DamagedArchive("unexpected end of data")
        self.marked = len(block) == BLOCK
        if self.marked and self._take(BLOCK).strip(b"\0"):
            raise DamagedArchive("a block of zeros stands between two members")

    def _member(self, header: _Header) -> Entry:
        raw, records = header.raw, header.records
        kind = _KINDS.get(raw[7])
        name = self.name = os.fsdecode(_member_name(raw, records))
        if kind is None:
            raise DamagedArchive(f"{name!r:.200} has the unknown type {raw[7]!r}")
        if len(name) > _LONGEST_PATH:
            raise DamagedArchive(f"a name in it is longer than {_LONGEST_PATH} bytes")
        path = clean_path(name)
        if raw[7] == b"\0" and name.endswith("/"):  # V7 knows no directories
            kind = DIRECTORY
        link, size, regions = "", 0, None
        is_reserved = self.whiteouts and _RESERVED in f"/{path}"
        if kind == FILE:
            size, regions = self._file(name, header)
        elif kind in (SYMLINK, HARDLINK):
            link = os.fsdecode(records.get("linkpath") or raw[8].partition(b"\0")[0])
            if "\0" in link or not link:
                raise DamagedArchive(f"{name!r:.200} is a link to {link!r:.200}, which is not a path")
            link = clean_path(link) if kind == HARDLINK else link
        if is_reserved:
            return _whiteout(path)
        device = (0, 0)
        if kind in (CHARACTER, BLOCK_DEVICE):
            device = (_number(raw[11], "device"), _number(raw[12], "device"))
            if not (0 <= device[0] < _MAJORS and 0 <= device[1] < _MINORS):
                raise DamagedArchive(f"{name!r:.200} can't be the device {device[0]}:{device[1]}")
        return Entry(
            path,
            kind,
            _number(raw[1], "mode") & 0o7777,
            _decimal(records, "uid", _number(raw[2], "uid")),
            _decimal(records, "gid", _number(raw[3], "gid")),
            _time(records.get("mtime"), _number(raw[5], "mtime")),
            size,
            link,
            device,
            _attributes(name, records),
            regions,
        )

    def _file(self, name: str, header: _Header) -> tuple[int, Regions | None]:
        """Find out where a file has data, get ready to read it, and return its size and regions."""
        records = header.records
        size = stored = _decimal(records, "size", header.size)
        if not 0 <= size <= _LARGEST_FILE:
            raise DamagedArchive(f"{name!r:.200} can't have a size of {size} bytes")
        padding = -stored % BLOCK
        numbers: list[int] | None = None
        if header.raw[7] == b"S":
            size, numbers = self._old_gnu_map(header.block)
        elif (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")) == (b"1", b"0"):
            size = _decimal(records, "GNU.sparse.realsize", stored)
            numbers, used = self._map_1_0(stored)
            stored -= used
        elif "GNU.sparse.size" in records or "GNU.sparse.map" in records:
            size = _decimal(records, "GNU.sparse.size", stored)
            table = records.get("GNU.sparse.map")
            _check_count(table.count(b",") // 2 if table else 0)
            numbers = [_integer(text) for text in (table.split(b",") if table else header.regions_0_0)]
        regions = None if numbers is None else _regions(name, numbers, size, stored)
        if regions is None:
            self._regions, data = [(0, size)] if size else [], size
        else:
            self._regions, data = list(regions), sum(length for _, length in regions)
        self._passed = stored - data + padding
        self._content -= data
        if self._content < 0:
            raise DamagedArchive(f"its files are larger than {self._limits.content} bytes")
        return size, regions

    def _old_gnu_map(self, block: bytes) -> tuple[int, list[int]]:
        """Read the map of the old GNU format: four regions in the header, 21 in each block that follows."""
        numbers = _old_gnu_numbers(block, 386, 4)
        more, size = block[482], _number(block[483:495], "size")
        while more:
            block = self._extension(BLOCK)
            numbers += _old_gnu_numbers(block, 0, 21)
            more = block[504]
        return size, numbers

    def _map_1_0(self, stored: int) -> tuple[list[int], int]:
        """Read the map that stands before the data: decimal numbers on lines of their own."""
        numbers: list[int] = []
        rest, used = b"", 0
        while not numbers or len(numbers) <= 2 * numbers[0]:
            used += BLOCK
            if used > stored + -stored % BLOCK:
                raise DamagedArchive("the map of a sparse file is cut off")
            *lines, rest = (rest + self._extension(BLOCK)).split(b"\n")
            numbers += [_integer(line) for line in lines]
            _check_count(numbers[0] if numbers else 0)
            if len(rest.rstrip(b"\0")) > 20 and (not numbers or len(numbers) <= 2 * numbers[0]):
                raise DamagedArchive("the map of a sparse file is invalid")
        return numbers[1 : 1 + 2 * numbers[0]], used


def _attributes(name: str, records: Mapping[str, bytes]) -> dict[str, bytes]:
    found = {unescaped(key[len(XATTR) :]): records[key] for key in records if key.startswith(XATTR)}
    if any("\0" in attribute for attribute in found):
        raise DamagedArchive(f"{name!r:.200} has an extended attribute with a NUL in its name")
    return found


def clean_path(name: str) -> str:
    """Return a name of an archive as a path below its root: `/a/./b/../c` is `a/c`, `./` is empty.

    Raises:
        DamagedArchive: it leads out of the root, or contains NUL.
    """
    if "\0" in name:
        raise DamagedArchive(f"{name!r:.200} has a NUL in its name")
    if "//" not in name and "/." not in name and not name.startswith((".", "/")):
        return name.removesuffix("/")
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                raise DamagedArchive(f"{name!r:.200} leads out of the tree")
            parts.pop()
        elif part and part != ".":
            parts.append(part)
    return "/".join(parts)


def starts_like_tar(block: bytes) -> bool:
    """Tell whether `block`, the first 512 bytes of a file, is the header of a tar archive's member."""
    if len(block) != BLOCK or not block.strip(b"\0"):
        return False
    try:
        _check(block, block[148:156])
        _number(block[124:136], "size")
    except DamagedArchive:
        return False
    return True


@lru_cache(16)  # the headers of extended headers are all alike, half of all in many archives
def _fields(block: bytes) -> tuple[tuple[bytes, ...], bytes, int]:
    """Return the fields of a header, and of these the type and the size."""
    raw = _RAW.unpack(block)
    _check(block, raw[6])
    return raw, raw[7], _number(raw[4], "size")


def _check(block: bytes, stored: bytes) -> None:
    found = _number(stored, "checksum")
    if found == checksum(block) - sum(stored) + 256:
        return
    # Some old tars added signed characters (POSIX.1-2017, pax, "ustar Interchange Format").
    if found != sum(struct.unpack("504b", block[:148] + block[156:])) + 256:
        raise DamagedArchive("a header in it is malformed")


@lru_cache(4096)
def _number(field: bytes, what: str) -> int:
    """Return a number of a header: octal digits, or the binary form of GNU tar and star."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # The first bit marks the form; the second is the sign.
        return number - (1 << bits) if field[0] & 0x40 else number - (1 << (bits - 1))
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise DamagedArchive(f"a header in it is malformed: its {what} is {text!r}") from None


def _integer(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise DamagedArchive(f"a header in it has {text!r:.100} for a number")
    return int(text)


def _decimal(records: dict[str, bytes], keyword: str, otherwise: int) -> int:
    text = records.get(keyword)
    return _integer(text) if text else otherwise


def _records(data: bytes) -> tuple[dict[str, bytes], list[bytes]]:
    """Split an extended header: its records by keyword, and the regions of GNU.sparse 0.0 in their order."""
    found: dict[str, bytes] = {}
    regions: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space] if space > 0 else b""
        if not length.isdigit():
            if not data[at:].strip(b"\0"):  # some pad it, and count that
                break
            raise DamagedArchive("an extended header in it is malformed")
        end = at + int(length)
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 2 or data[end - 1] != 0x0A or not equals or not keyword:
            raise DamagedArchive("an extended header in it is malformed")
        at = end
        name = os.fsdecode(keyword)
        if name in _SPARSE_0_0:
            regions.append(value)
        else:
            found[name] = value
            if len(found) > _RECORDS:
                raise DamagedArchive(f"a header in it has more than {_RECORDS} records")
    return found, regions


def _member_name(raw: tuple[bytes, ...], records: dict[str, bytes]) -> bytes:
    name = records.get("GNU.sparse.name") or records.get("path")
    if name:
        return name
    name = raw[0].partition(b"\0")[0]
    # GNU tar has times of its own where POSIX has the beginning of a long name.
    prefix = raw[13].partition(b"\0")[0] if not raw[9].startswith(b"ustar ") else b""
    return prefix + b"/" + name if prefix else name


def _time(text: bytes | None, otherwise: int) -> int:
    """Return a time in nanoseconds, exactly as it is written.

    What 64 bits can't hold becomes the nearest time that they can (1677 to 2262), anything else 1970.
    """
    number: float = otherwise * _SECOND
    if text:
        found = _TIME.fullmatch(text)
        if found:
            number = int(found[2]) * _SECOND + int((found[3] or b"")[:9].ljust(9, b"0"))
            number = -number if found[1] else number
        else:
            try:
                number = float(text) * _SECOND
            except ValueError:
                return 0
    if math.isnan(number):
        return 0
    return int(min(max(number, FIRST_TIME_NS), LAST_TIME_NS))


def _old_gnu_numbers(block: bytes, at: int, count: int) -> list[int]:
    fields = range(at, at + 24 * count, 12)
    return [_number(block[start : start + 12], "map") for start in fields]


def _check_count(regions: int) -> None:
    if regions > MAX_REGIONS + 1:  # the last one may only tell the size
        raise DamagedArchive(f"a file in it has more than {MAX_REGIONS} holes")


def _regions(name: str, numbers: list[int], size: int, stored: int) -> Regions:
    _check_count(len(numbers) // 2)
    if len(numbers) % 2:
        raise DamagedArchive(f"the regions of {name!r:.200} are invalid")
    end = data = 0
    found = []
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        if length == 0:  # fills the table of the old format; marks the end of the file in others
            continue
        if start < end or length < 0:
            raise DamagedArchive(f"the regions of {name!r:.200} overlap")
        end = start + length
        data += length
        found.append((start, length))
    if not end <= size <= _LARGEST_FILE or data > stored:
        raise DamagedArchive(f"{name!r:.200} can't have a size of {size} bytes with such regions")
    return tuple(found)


def _whiteout(path: str) -> Entry:
    """Return what a name means that has the prefix in it, whatever file it is, as containerd has it."""
    parent, _, name = path.rpartition("/")
    if _RESERVED not in f"/{parent}":
        if name == OPAQUE_NAME:
            return Entry(parent, OPAQUE)
        name = name[len(WHITEOUT_PREFIX) :]
        if name not in ("", ".", "..") and not name.startswith(WHITEOUT_PREFIX):
            return Entry(f"{parent}/{name}" if parent else name, WHITEOUT)
    raise DamagedArchive(f"{path!r:.200} is not a whiteout")
