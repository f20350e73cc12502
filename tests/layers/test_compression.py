"""What counts as damage to compressed data: the same on every Python."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from firebuild_bootstrap.layers.compression import compressing, decompress, decompressed
from firebuild_bootstrap.layers.reader import DamagedArchive

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "zstd with a checksum": zstandard.ZstdCompressor(write_checksum=True).compress,
}
DATA = os.urandom(3000) + bytes(200_000) + b"end"


@pytest.fixture(params=COMPRESSIONS)
def compress(request: pytest.FixtureRequest) -> Callable[[bytes], bytes]:
    return COMPRESSIONS[request.param]


def test_compressed_data_may_have_several_streams_and_zeros_between_and_after_them(
    compress: Callable[[bytes], bytes],
) -> None:
    assert decompress(compress(DATA)) == DATA
    assert (
        decompress(compress(DATA) + bytes(7) + compress(b"more") + compress(b"") + bytes(512))
        == DATA + b"more"
    )


def test_compressed_data_is_read_in_pieces_of_any_size(compress: Callable[[bytes], bytes]) -> None:
    stream = decompressed(io.BufferedReader(io.BytesIO(compress(DATA))))
    assert b"".join(iter(lambda: stream.read(777), b"")) == DATA


def test_compressed_data_that_is_cut_off_anywhere_is_damage(compress: Callable[[bytes], bytes]) -> None:
    whole = compress(DATA)
    for end in (*range(7, len(whole), 211), *range(len(whole) - 20, len(whole))):
        with pytest.raises(DamagedArchive):
            decompress(whole[:end])


@pytest.mark.parametrize("rubbish", [b"?", b"rubbish that is long enough", b"\0\0?"])
def test_rubbish_after_compressed_data_is_damage(compress: Callable[[bytes], bytes], rubbish: bytes) -> None:
    with pytest.raises(DamagedArchive, match="not compressed"):
        decompress(compress(DATA) + rubbish)


def test_frames_that_zstandard_skips_are_skipped() -> None:
    skipped = b"\x5a\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc"
    whole = skipped + zstandard.ZstdCompressor().compress(DATA) + skipped
    assert decompress(whole) == DATA


def test_little_data_that_becomes_much_is_never_in_memory(compress: Callable[[bytes], bytes]) -> None:
    whole = compress(bytes(128 << 20))
    tracemalloc.start()
    try:
        stream = decompressed(io.BufferedReader(io.BytesIO(whole)))
        assert sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) == 128 << 20
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("kind", "level"), [("gzip", 0), ("gzip", 6), ("zstd", 3), ("uncompressed", 0)])
def test_what_is_written_is_the_same_however_it_comes_and_on_any_number_of_processors(
    kind: str, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(1).randbytes(1_500_000) + bytes(2_000_000)
    for length in (0, 1, len(data)):
        found = set()
        for piece, processors in ((4096, {0}), (1 << 20, {0, 1, 2}), (len(data), {0, 1})):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, found=processors: found)
            out = io.BytesIO()
            with compressing(out, kind, level) as writer:
                for start in range(0, length, piece):
                    part = memoryview(data)[start : min(start + piece, length)]
                    assert writer.write(part) == len(part)
            found.add(out.getvalue())
        (written,) = found
        if kind != "uncompressed":
            assert decompressed(io.BufferedReader(io.BytesIO(written))).read() == data[:length]
        else:
            assert written == data[:length]
    assert level == 0 or len(written) < 1_600_000
    if kind == "gzip":
        assert gzip.decompress(written) == data


def test_an_error_ends_the_compression_without_an_end() -> None:
    for kind in ("gzip", "zstd"):
        out = io.BytesIO()
        with pytest.raises(KeyError), compressing(out, kind, 1) as writer:
            writer.write(b"x")
            raise KeyError
        assert kind != "gzip" or out.getvalue() == b""


def test_compressed_data_that_is_changed_is_damage() -> None:
    data = bytearray(gzip.compress(DATA))
    data[10:40] = bytes(30)
    with pytest.raises(DamagedArchive, match="its compressed data is corrupt: "):
        decompress(bytes(data))
