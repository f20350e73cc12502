"""The archives that users bring as bases: decompressed and checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.image.worker.unpack import name_parts
from firebuild_bootstrap.tarball import DamagedArchive, TarReader, decompressed

_PIECE: Final = 1024 * 1024


def decompress(source: Path, target: Path) -> tuple[int, str]:
    """Write the tar archive `source` (plain, gz, bz2, xz or zst) to `target` without compression.

    Returns:
        the size in bytes and the `sha256:…` digest of what was written.

    Raises:
        InputError: the compressed data is damaged.
        OSError: one of the files can't be read or written.
    """
    digest = hashlib.sha256()
    size = 0
    with open(source, "rb") as raw, open(target, "wb") as writer:
        reader = decompressed(raw)
        try:
            while piece := reader.read(_PIECE):
                writer.write(piece)
                digest.update(piece)
                size += len(piece)
        except DamagedArchive as error:
            raise _damaged(source, str(error)) from error
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
        with open(archive, "rb") as content:
            tar = TarReader(content)
            while (member := tar.next()) is not None:
                names.update(name_parts(member.name)[:1])
    except TreeError as error:
        raise InputError(f"{source}: {error.message}", hint=error.hint or None) from error
    except DamagedArchive as error:
        raise _damaged(source, f"it is no tar archive, or broken: {error}") from error
    if {"oci-layout", "blobs"} <= names or "manifest.json" in names:
        raise InputError(
            f"{source} is a container image with layers, expected the files of a root directory",
            hint="make a container of it and export that: `docker create IMAGE`, `docker export CONTAINER`",
        )
    if not names:
        raise InputError(f"{source} is an archive without files")
    if not tar.marked:
        raise _damaged(source, "its end mark is missing, so it was probably cut off")


def _damaged(source: Path, why: str) -> InputError:
    return InputError(f"{source} is damaged: {why}", hint="make or download it again")
