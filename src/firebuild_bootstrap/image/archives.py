"""Reading the archives that users bring: decompressing and checking them."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, cast

import zstandard

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.unpack import BROKEN, name_parts

_PIECE: Final = 1024 * 1024
_BLOCK: Final = 512

# By content and not by name; the numbers are those of the formats' own specifications.
_OPENERS: Final[tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...]] = (
    (b"\x1f\x8b", lambda source: gzip.GzipFile(fileobj=source)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
    (
        b"\x28\xb5\x2f\xfd",
        lambda source: zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True),
    ),
)


def decompress(source: Path, target: Path, *, limit: int | None = None, name: str = "") -> tuple[int, str]:
    """Write the tar archive `source` (plain, gz, bz2, xz or zst) to `target` without compression.

    Args:
        limit: bytes that may come out of it.
        name: what to call it in messages, by default its path.

    Returns:
        the size in bytes and the `sha256:…` digest of what was written.

    Raises:
        InputError: the compressed data is damaged, or more than `limit`.
        OSError: one of the files can't be read or written.
    """
    digest = hashlib.sha256()
    size = 0
    with open(source, "rb") as raw, open(target, "wb") as writer:
        magic = raw.read(6)
        raw.seek(0)
        opener = next((opener for start, opener in _OPENERS if magic.startswith(start)), None)
        reader = opener(raw) if opener else raw
        try:
            while piece := reader.read(_PIECE):
                writer.write(piece)
                digest.update(piece)
                size += len(piece)
                if limit is not None and size > limit:
                    raise InputError(f"{name or source} is larger than {limit >> 20} MiB unpacked")
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            raise _damaged(name or source, str(error)) from error
        except OSError as error:
            if error.errno is None:  # bz2 says so about damaged data
                raise _damaged(name or source, str(error)) from error
            raise
    return size, f"sha256:{digest.hexdigest()}"


def check_root_archive(archive: Path, source: Path) -> None:
    """Make sure that an uncompressed archive is complete and can be the root of a file system.

    Args:
        source: what to call it in messages.

    Raises:
        InputError: it is damaged or cut off, empty, unsafe, or an image with layers and no root.
    """
    names: set[str] = set()
    try:
        with tarfile.open(archive, "r:") as tar:
            while (member := tar.next()) is not None:
                parts = name_parts(member.name)
                names.update(parts[:1])
                cast(Any, tar).members = []
            end = tar.offset
    except TreeError as error:
        raise InputError(f"{source}: {error.message}", hint=error.hint or None) from error
    except BROKEN as error:
        raise _damaged(source, f"it is no tar archive, or broken: {error}") from error
    if {"oci-layout", "blobs"} <= names or "manifest.json" in names:
        raise InputError(
            f"{source} is a container image with layers, expected the files of a root directory",
            hint="make a container of it and export that: `docker create IMAGE`, `docker export CONTAINER`",
        )
    if not names:
        raise InputError(f"{source} is an archive without files")
    with open(archive, "rb") as content:
        content.seek(end)
        if content.read(_BLOCK) != bytes(_BLOCK):
            raise _damaged(source, "its end mark is missing, so it was probably cut off")


def _damaged(source: Path | str, why: str) -> InputError:
    return InputError(f"{source} is damaged: {why}", hint="make or download it again")
