"""Reading tar archives that users bring, plain or compressed, so that damage is an error on every Python.

What counts as damage is decided here and not by the version of `tarfile`, which takes a header that is none
for the end of the archive, nor by those of the decompressors, some of which ignore what follows the end of
their data or do not notice that it is cut off. Nothing here goes backwards in the archive, so pipes are read
as well.
"""

from __future__ import annotations

import bz2
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK: Final = tarfile.BLOCKSIZE
_PIECE: Final = 64 * 1024
# The largest thing that a header may consist of. The kernel's own limits for a path (4 KiB) and for all
# extended attributes of a file (64 KiB in ext4 and most others) leave room for thousands of sparse regions.
_HEADER_BYTES: Final = 16 * 1024 * 1024
_LARGEST_FILE: Final = 2**63 - 1  # what off_t holds
_SECOND: Final = 10**9
FIRST_TIME_NS: Final = -(2**63)
LAST_TIME_NS: Final = 2**63 - 1
_Read = TypeVar("_Read")


class DamagedArchive(Exception):
    """The archive, or what it is compressed with, is not as its format wants it."""


DAMAGE: Final[tuple[type[Exception], ...]] = (DamagedArchive, tarfile.TarError)
"""What the content of a member may raise when it is read."""


# --- compression ----------------------------------------------------------------------------------------


class _Decoder(Protocol):
    """One compressed stream; `bz2` and `lzma` have these already."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._stream.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._stream.decompress(self._stream.unconsumed_tail + data, max_length)


class _Zstandard:
    """Its library has no limit for what one call returns, so it gets little at a time.

    A block of 128 KiB can be four bytes long (RFC 8878, 3.1.1.2), so one portion becomes 16 MiB at most.
    """

    _PORTION: Final = 512

    def __init__(self) -> None:
        import zstandard  # only where there is something for it: it takes a while

        self._stream = zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError
        self._waiting = b""

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data + self._waiting

    def decompress(self, data: bytes, max_length: int, /) -> bytes:  # noqa: ARG002
        data = self._waiting + data
        self._waiting = data[self._PORTION :]
        try:
            return self._stream.decompress(data[: self._PORTION])
        except self._error as error:
            raise ValueError(str(error)) from error


_DAMAGED_DATA: Final = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
# By content and not by name; the numbers are those of the formats' own specifications.
_FORMATS: Final[tuple[tuple[bytes, Callable[[], _Decoder]], ...]] = (
    (b"\x1f\x8b", _Gzip),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    (b"\x28\xb5\x2f\xfd", _Zstandard),
    # Frames to be skipped, which pzstd begins with and zstd:chunked ends with (RFC 8878, 3.1.2).
    *((bytes((0x50 + number,)) + b"\x2a\x4d\x18", _Zstandard) for number in range(16)),
)
_MAGIC_BYTES: Final = 6


def _decoder(start: bytes) -> Callable[[], _Decoder] | None:
    return next((decoder for magic, decoder in _FORMATS if start.startswith(magic)), None)


class _Decompressed(io.RawIOBase):
    """All the streams of a compressed file, one after the other; zeros may pad them, nothing else."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__()
        self._source = source
        self._input = b""
        self._decoder: _Decoder | None = None
        self._ready = b""  # decompressed, and more than was asked for

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        while not self._ready and (self._decoder or self._begin()):
            self._ready = self._decompress(len(view))
        length = min(len(view), len(self._ready))
        view[:length] = self._ready[:length]
        self._ready = self._ready[length:]
        return length

    def _begin(self) -> bool:
        """Start with the next stream; False at the end of the file."""
        while len(self._input) < _MAGIC_BYTES and (more := self._source.read(_PIECE)):
            self._input = (self._input + more).lstrip(b"\0")
        if not self._input:
            return False
        decoder = _decoder(self._input)
        if decoder is None:
            raise DamagedArchive("something in it is not compressed")
        self._decoder = decoder()
        return True

    def _decompress(self, size: int) -> bytes:
        decoder = cast(_Decoder, self._decoder)
        data, self._input = self._input, b""
        ended = False
        if not data and decoder.needs_input:
            data = self._source.read(_PIECE)
            ended = not data
        try:
            found = decoder.decompress(data, size)
        except _DAMAGED_DATA as error:
            raise DamagedArchive(f"its compressed data is wrong: {error}") from error
        if decoder.eof:
            self._input = decoder.unused_data.lstrip(b"\0")
            self._decoder = None
        elif ended and not found:
            raise DamagedArchive("its compressed data ends too early: it was cut off")
        return found


def decompressed(source: io.BufferedReader) -> IO[bytes]:
    """Return what is in `source`, which may be compressed with gzip, bzip2, xz or zstd, or not at all.

    Reading the result raises DamagedArchive where the compressed data is damaged, cut off, or followed by
    something else.
    """
    if _decoder(source.peek(_MAGIC_BYTES)) is None:
        return source
    return io.BufferedReader(_Decompressed(source), _PIECE)


def decompress(data: bytes) -> bytes:
    """Return what is in `data`, compressed with one of these formats.

    Raises:
        DamagedArchive: it is not; or as reading from `decompressed`.
    """
    return io.BufferedReader(_Decompressed(io.BytesIO(data))).read()


# --- members --------------------------------------------------------------------------------------------


class _Forward:
    """An archive from its beginning to its end, for `tarfile`; it remembers what was read last.

    `allowance` is how many bytes may still be read, None for any number.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._at = 0
        self.last = b""
        self.allowance: int | None = _HEADER_BYTES

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True  # forward; what `tarfile` gives out asks

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or position < self._at:
            raise DamagedArchive("a size in it is wrong")
        if self._source.seekable() and position > self._at:
            self._source.seek(position - self._at, io.SEEK_CUR)
            self._at = position
        while self._at < position:
            passed = len(self._source.read(min(position - self._at, _PIECE)))
            if not passed:
                raise DamagedArchive("unexpected end of data")
            self._at += passed
        return self._at

    def read(self, size: int, /) -> bytes:
        if size < 0 or (self.allowance is not None and size > self.allowance):
            raise DamagedArchive("a header in it is too large")
        pieces = []
        missing = size
        while missing and (piece := self._source.read(missing)):
            pieces.append(piece)
            missing -= len(piece)
        self.last = b"".join(pieces)
        self._at += len(self.last)
        if self.allowance is not None:
            self.allowance -= len(self.last)
        return self.last


class TarReader:
    """The members of an archive, in their order.

    Args:
        source: an archive without compression.

    Raises:
        DamagedArchive: it does not begin like an archive. So do all methods where it is damaged; errors of
            the file itself come as OSError.
    """

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source
        self._forward = _Forward(source)
        self.marked = False
        """After the last member: the archive has an end mark, as it should have."""
        self._tar = self._guarded(
            lambda: tarfile.TarFile(
                fileobj=cast("IO[bytes]", self._forward),
                encoding="utf-8",
                errors="surrogateescape",
                ignore_zeros=False,
            )
        )

    def next(self) -> tarfile.TarInfo | None:
        """Return the next member; None after the last one."""
        # Members are forgotten once passed, so that memory does not grow with the archive.
        cast(Any, self._tar).members = []
        self._forward.allowance = _HEADER_BYTES
        member = self._guarded(self._tar.next)
        if member is None:
            self._end()
        else:
            _check_size(member)
        self._forward.allowance = None
        return member

    def content(self, member: tarfile.TarInfo) -> IO[bytes]:
        """Open the content of the regular file that `next` has just returned; reading may raise DAMAGE."""
        return self._tar.extractfile(member) or io.BytesIO()

    def drain(self) -> None:
        """Read what follows the end mark: the checksum of a compressed file stands at its very end."""
        while self._source.read(_PIECE):
            pass

    def _end(self) -> None:
        """Make sure that the archive ends here: with two blocks of zeros, or with the file.

        `tarfile` also stops at a header that is none, and at a single block of zeros between two members.
        """
        mark = self._forward.last
        if mark.strip(b"\0"):
            raise DamagedArchive("a header in it is none")
        self.marked = len(mark) == _BLOCK
        if self.marked and self._forward.read(_BLOCK).strip(b"\0"):
            raise DamagedArchive("a block of zeros stands between two members")

    @staticmethod
    def _guarded(read: Callable[[], _Read]) -> _Read:
        try:
            return read()
        # What tarfile lets through for absurd numbers in extended headers, and for headers without end.
        except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
            raise DamagedArchive(str(error) or type(error).__name__) from error


def _check_size(member: tarfile.TarInfo) -> None:
    end = 0
    # Regions of a sparse file, in the order in which their data stands in the archive.
    for start, length in cast("list[tuple[int, int]] | None", cast(Any, member).sparse) or ():
        if length == 0:  # fills the table of the old format
            continue
        if start < end or length < 0:
            raise DamagedArchive(f"the regions of {member.name!r} overlap")
        end = start + length
    if not end <= member.size <= _LARGEST_FILE:
        raise DamagedArchive(f"{member.name!r} can't have a size of {member.size} bytes")


def starts_like_tar(block: bytes) -> bool:
    """Tell whether `block`, the first 512 bytes of a file, is the header of a tar archive's member."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, IndexError, OverflowError):
        return False
    return True


def mtime_ns(member: tarfile.TarInfo) -> int:
    """Return a member's modification time in nanoseconds since 1970, exactly as the archive says.

    What 64 bits can't hold becomes the nearest time that they can (1677 to 2262), and what is no time 1970.
    """
    try:
        seconds = Decimal(member.pax_headers.get("mtime", "") or member.mtime)
    except (InvalidOperation, ValueError):
        return 0
    if seconds.is_nan():
        return 0
    # Compared before it becomes a whole number, which for 1e999999999 would have a billion digits.
    if not FIRST_TIME_NS // _SECOND < seconds < LAST_TIME_NS // _SECOND:
        return LAST_TIME_NS if seconds > 0 else FIRST_TIME_NS
    return int(seconds * _SECOND)
