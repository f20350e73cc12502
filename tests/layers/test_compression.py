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
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard

from firebuild_bootstrap.layers import compression
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


def with_a_dictionary_of_4_gib(small: bytes) -> bytes:
    """Return a file of xz whose first block says so (The .xz File Format, 3.1 and 5.3.1)."""
    data = bytearray(small)
    size = (data[12] + 1) * 4
    assert data[14:16] == b"\x21\x01"
    data[16] = 40
    data[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(data[12 : 12 + size - 4]))
    return bytes(data)


def of_zstd_with_a_window_of_2_gib() -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # knows no size
    return compressor.compress(DATA) + compressor.flush()


@pytest.mark.parametrize(
    "greedy",
    [with_a_dictionary_of_4_gib(lzma.compress(DATA)), of_zstd_with_a_window_of_2_gib()],
    ids=["xz", "zstd"],
)
def test_compressed_data_can_ask_for_so_much_memory_only(greedy: bytes) -> None:
    with pytest.raises(DamagedArchive, match="needs more than 128 MiB of memory: compress it as"):
        decompress(greedy)


def test_what_xz_makes_at_its_best_is_read() -> None:
    assert decompress(lzma.compress(DATA, preset=9 | lzma.PRESET_EXTREME)) == DATA


@pytest.mark.parametrize(
    "empty",
    [
        *(compress(b"") for compress in COMPRESSIONS.values()),
        b"\x50\x2a\x4d\x18" + bytes(4),
        gzip.compress(b"") + b"\0",
    ],
    ids=[*COMPRESSIONS, "skippable", "gzip and a zero"],
)
def test_many_streams_take_time_in_proportion_to_their_number(
    empty: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = 0
    find = compression._decoder

    def counted(start: bytes) -> Callable[[], Any] | None:
        make = find(start)
        assert make is not None
        decoder = make()
        decompress_some = decoder.decompress

        class Counting:
            needs_input = property(lambda _: decoder.needs_input)
            eof = property(lambda _: decoder.eof)
            unused_data = property(lambda _: decoder.unused_data)

            def decompress(self, data: bytes, most: int) -> bytes:
                nonlocal given
                given += len(data)
                return decompress_some(data, most)

        return Counting

    monkeypatch.setattr(compression, "_decoder", counted)
    whole = empty * 10_000 + gzip.compress(DATA)
    assert decompress(whole) == DATA
    assert given < 100 * len(whole)  # of each stream a portion, not all that was read


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
