"""Compressed archives that users bring: gzip, bzip2, xz and zstd, with damage told the same on every Python.

What goes out is gzip or zstd, whose bytes depend on nothing but the data and the versions that are pinned.

Some decompressors ignore what follows the end of their data or do not notice that it is cut off; here both
are damage. Nothing goes backwards, so pipes are read as well. For the host: vminit carries no decompressors.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import IO, TYPE_CHECKING, Final, Protocol, Self, cast

from .reader import DamagedArchive
from .tar import Sink

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_PIECE: Final = 64 * 1024
# What a stream gets at first, and twice as much each time: what it leaves of its last portion is copied, and
# a file may hold a million streams.
_FIRST_PORTION: Final = 512
# What a stream may make its decompressor keep of what it has written. `xz -9` has 64 MiB; without a limit xz
# allows 4 GiB, and zstd the same 128 MiB.
_MOST_DICTIONARY: Final = 128 << 20


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


class _Skippable:
    """A frame whose content is for others (RFC 8878, 3.1.2); the library takes long for each."""

    _HEADER: Final = 8

    def __init__(self) -> None:
        self.eof = False
        self.needs_input = True
        self.unused_data = b""
        self._header = b""
        self._left = self._HEADER

    def decompress(self, data: bytes, max_length: int, /) -> bytes:  # noqa: ARG002
        if len(self._header) < self._HEADER:
            taken = data[: self._HEADER - len(self._header)]
            self._header += taken
            if len(self._header) < self._HEADER:
                return b""
            data = data[len(taken) :]
            self._left = int.from_bytes(self._header[4:], "little")
        self.eof = len(data) >= self._left
        self.unused_data = bytes(data[self._left :])
        self._left -= len(data)
        return b""


def _xz() -> _Decoder:
    # Its own structures are some hundred kilobytes.
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_DICTIONARY + (1 << 20))


# What liblzma, as Python words it, and libzstd say of that.
_TOO_MUCH: Final = ("Memory usage limit exceeded", "Frame requires too much memory")
_DAMAGED_DATA: Final = (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error)
# By content and not by name; the numbers are those of the formats' own specifications.
_FORMATS: Final[tuple[tuple[bytes, str, Callable[[], _Decoder]], ...]] = (
    (b"\x1f\x8b", "gzip", _Gzip),
    (b"BZh", "bzip2", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\x00", "xz", _xz),
    (b"\x28\xb5\x2f\xfd", "zstd", _Zstandard),
    # pzstd begins with such frames, and zstd:chunked ends with them.
    *((bytes((0x50 + number,)) + b"\x2a\x4d\x18", "zstd", _Skippable) for number in range(16)),
)
_MAGIC_BYTES: Final = 6


def _decoder(start: bytes) -> Callable[[], _Decoder] | None:
    return next((decoder for magic, _, decoder in _FORMATS if start.startswith(magic)), None)


def compression_of(source: io.BufferedReader) -> str:
    """Return how the beginning of a file is compressed: gzip, bzip2, xz or zstd; empty for not at all."""
    start = source.peek(_MAGIC_BYTES)
    return next((name for magic, name, _ in _FORMATS if start.startswith(magic)), "")


class _Decompressed(io.RawIOBase):
    """All the streams of a compressed file, one after the other; zeros may pad them, nothing else."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__()
        self._source = source
        self._piece = memoryview(b"")
        self._at = 0  # what comes before was given to a decoder
        self._portion = _FIRST_PORTION
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
        start = self._start()
        while len(start) < _MAGIC_BYTES and (more := self._source.read(_PIECE)):
            self._piece, self._at = memoryview(start + more), 0
            start = self._start()
        if not start:
            return False
        decoder = _decoder(start)
        if decoder is None:
            raise DamagedArchive("something in it is not compressed")
        self._decoder, self._portion = decoder(), _FIRST_PORTION
        return True

    def _start(self) -> bytes:
        """Return the first bytes of what there is, behind zeros."""
        while True:
            start = bytes(self._piece[self._at : self._at + _FIRST_PORTION])
            if not start.startswith(b"\0"):
                return start[:_MAGIC_BYTES]
            self._at += len(start) - len(start.lstrip(b"\0"))

    def _decompress(self, size: int) -> bytes:
        decoder = cast(_Decoder, self._decoder)
        data = b""
        ended = False
        if decoder.needs_input:
            if self._at == len(self._piece):
                self._piece, self._at = memoryview(self._source.read(_PIECE)), 0
            data = bytes(self._piece[self._at : self._at + self._portion])
            ended = not data
            self._at += len(data)
            self._portion = min(2 * self._portion, _PIECE)
        try:
            found = decoder.decompress(data, size)
        except _DAMAGED_DATA as error:
            raise DamagedArchive(_why(error)) from error
        if decoder.eof:
            self._at -= len(decoder.unused_data)  # a decoder gets no more before it has used what it had
            self._decoder = None
        elif ended and not found:
            raise DamagedArchive("its compressed data ends too early: it was cut off")
        return found


def _why(error: Exception) -> str:
    if any(words in str(error) for words in _TOO_MUCH):
        most = _MOST_DICTIONARY >> 20
        return f"it needs more than {most} MiB of memory: compress it as `xz -9` or `zstd -19` does"
    return f"its compressed data is corrupt: {error}"


def decompressed(source: io.BufferedReader) -> IO[bytes]:
    """Return what is in `source`, which may be compressed with gzip, bzip2, xz or zstd, or not at all.

    Reading the result raises DamagedArchive where the compressed data is damaged, cut off, or followed by
    something else.
    """
    if _decoder(source.peek(_MAGIC_BYTES)) is None:
        return source
    return io.BufferedReader(_Decompressed(source), _PIECE)


class Writer(Protocol):
    """Takes all that it is given."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take `data`, and return its length."""
        ...


@contextmanager
def compressing(out: Sink, kind: str, level: int) -> Iterator[Writer]:
    """Give a writer that compresses on all processors; the same data gives the same bytes, however it comes.

    Args:
        out: gets the compressed data; it stays open.
        kind: `gzip`, `zstd` or `uncompressed`.
        level: of gzip 0 to 9, of zstd 0 to 22.
    """
    match kind:
        case "gzip":
            with _GzipWriter(out, level) as writer:
                yield writer
        case "zstd":
            import zstandard

            # With one worker at least: without any it compresses in another way, with any number in the same.
            count = len(os.sched_getaffinity(0))
            compressor = zstandard.ZstdCompressor(level=level, threads=count, write_checksum=True)
            with compressor.stream_writer(cast(IO[bytes], out), closefd=False) as stream:
                yield stream
        case _:
            yield _Plain(out)


class _Plain:
    """Passes on what it is given."""

    def __init__(self, out: Sink) -> None:
        self._out = out

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        self._out.write(data)
        return len(data)


class _GzipWriter:
    """Compresses with gzip.

    The data is cut into blocks, each of which is a member of its own (RFC 1952, 2.2), as bgzip does:
    libdeflate compresses what it has as a whole, three times as fast as zlib does and better. It comes with
    its package, so the bytes depend on no library of the distribution. Headers hold no name and no time.
    """

    _BLOCK: Final = 1024 * 1024

    def __init__(self, out: Sink, level: int) -> None:
        import deflate

        self._compress = partial(deflate.gzip_compress, compresslevel=level)
        self._out = out
        self._buffer = bytearray()
        self._empty = True
        count = len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(count)
        self._most = 2 * count
        self._waiting: deque[Future[bytearray]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if self._buffer or self._empty:
                    self._send(bytes(self._buffer))
                self._receive(0)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of `data`, see `Sink`."""
        self._buffer += data
        while len(self._buffer) >= self._BLOCK:
            self._send(bytes(self._buffer[: self._BLOCK]))
            del self._buffer[: self._BLOCK]
        return len(data)

    def _send(self, block: bytes) -> None:
        self._empty = False
        self._waiting.append(self._pool.submit(self._compress, block))
        self._receive(self._most)

    def _receive(self, left: int) -> None:
        while len(self._waiting) > left:
            self._out.write(self._waiting.popleft().result())


def decompress(data: bytes) -> bytes:
    """Return what is in `data`, compressed with one of these formats.

    Raises:
        DamagedArchive: it is not; or as reading from `decompressed`.
    """
    return io.BufferedReader(_Decompressed(io.BytesIO(data))).read()
