"""What counts as damage to an archive: the same on every Python."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from firebuild_bootstrap.tarball import DAMAGE, DamagedArchive, TarReader, decompress, decompressed

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


def header(name: str, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def names(data: bytes) -> list[str]:
    reader = TarReader(io.BytesIO(data))
    found = []
    while (member := reader.next()) is not None:
        found.append(member.name)
    return found


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


def test_an_archive_ends_with_zeros_or_with_the_file() -> None:
    assert names(
        header("a") + header("b") + bytes(1024) + b"whatever is in the rest of the tape's block"
    ) == [
        "a",
        "b",
    ]
    for end in (b"", bytes(100), bytes(512), bytes(700)):
        assert names(header("a") + end) == ["a"]


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "empty"),
        (header("a") + b"?" * 512 + header("b"), "a header in it is none"),
        (header("a") + b"?" * 100, "a header in it is none"),
        (header("a") + bytes(512) + header("b"), "a block of zeros stands between two members"),
        (header("a", size=5) + b"12345", "unexpected end of data"),
        (header("a", size=-512) + header("b"), "-512|invalid"),
        (header("a", size=1 << 63), "'a' can't have a size of"),
        (header("a", type=tarfile.XHDTYPE, size=-1) + bytes(1024), "header|invalid"),
        (
            header("a", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40) + bytes(1024),
            "a header in it is too large",
        ),
        (header("a", type=tarfile.XHDTYPE, size=0) * 3000 + header("b"), "recursion"),
    ],
)
def test_damage_is_told(archive: bytes, why: str) -> None:
    with pytest.raises(DamagedArchive, match=why):
        names(archive)


def test_damage_in_the_content_of_a_member_is_told_when_it_is_read() -> None:
    reader = TarReader(io.BytesIO(header("a", size=600) + bytes(512)))
    member = reader.next()
    assert member is not None
    with pytest.raises(DAMAGE, match="unexpected end of data"):
        while reader.content(member).read(100):
            pass


@pytest.mark.parametrize("table", ["0,5,3,1", "5,-1", "-5,1", "9,2"])
def test_a_sparse_file_whose_regions_make_no_sense_is_damage(table: str) -> None:
    info = tarfile.TarInfo("x")
    info.pax_headers = {"GNU.sparse.size": "10", "GNU.sparse.map": table}
    with pytest.raises(DamagedArchive):
        names(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))


def test_many_headers_of_one_member_do_not_fill_the_memory() -> None:
    long = b"x" * (9 << 20)
    name = header("n", type=tarfile.GNUTYPE_LONGNAME, size=len(long)) + long
    with pytest.raises(DamagedArchive, match="too large"):
        names(name + name + header("a") + bytes(1024))
