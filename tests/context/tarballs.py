"""Makes archives for the tests of ADD, and reads what becomes of them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from firebuild_bootstrap.context import ContextResource, Entry
from firebuild_bootstrap.errors import InputError, Location

Find = Callable[..., ContextResource]
HERE = Location("Dockerfile", 5)
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def tar(*members: tuple[tarfile.TarInfo, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for each in members:
            info, data = each if isinstance(each, tuple) else (each, b"")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def one_file(data: bytes = b"data", name: str = "file") -> bytes:
    return tar((member(name), data))


def add(find: Find, root: Path, data: bytes, **arguments: bool) -> ContextResource:
    (root / "archive").write_bytes(data)
    return find("archive", unpack=True, **arguments)


def read(entry: Entry) -> bytes:
    assert entry.open is not None
    with entry.open() as file:
        return file.read()


def error_of(resource: ContextResource) -> InputError:
    with pytest.raises(InputError) as caught:
        for entry in resource.entries():
            if entry.open is not None:
                read(entry)
    assert caught.value.location == HERE
    assert (
        "the archive 'archive' can't be unpacked" in caught.value.message
        or "can't be read" in caught.value.message
    )
    return caught.value
