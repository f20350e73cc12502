"""The archives that users bring as bases: decompressed and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers.compression import decompressed
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader
from firebuild_bootstrap.layers.tar import DIRECTORY, HARDLINK, Entry

_PIECE: Final = 1024 * 1024


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
        reader = decompressed(raw)
        try:
            while piece := reader.read(_PIECE):
                writer.write(piece)
                digest.update(piece)
                size += len(piece)
                if limit is not None and size > limit:
                    raise InputError(f"{name or source} is larger than {limit >> 20} MiB unpacked")
        except DamagedArchive as error:
            raise _damaged(name or source, str(error)) from error
    return size, f"sha256:{digest.hexdigest()}"


def check_root_archive(archive: Path, source: Path | str) -> None:
    """Make sure that an uncompressed archive is complete and can be the root of a file system.

    Args:
        source: what to call it in messages.

    Raises:
        InputError: it is damaged or cut off, empty, unsafe, or an image with layers and no root.
    """
    names: set[str] = set()
    try:
        with open(archive, "rb") as content:
            layer = LayerReader(content.fileno())
            directories = {""}
            for entry in filter(lambda entry: entry.path, layer):
                names.add(entry.path.partition("/")[0])
                _check_hard_link(entry, directories)
    except DamagedArchive as error:
        if not names:
            _refuse_others(archive, source)
        raise _damaged(source, f"it is not a tar archive, or broken: {error}") from error
    refuse_container_image(source, names)
    if not names:
        _refuse_others(archive, source)  # some begin with zeros, like an empty archive
        raise InputError(f"{source} is an archive without files")
    if not layer.marked:
        raise _damaged(source, "its end mark is missing, so it was probably cut off")


def _check_hard_link(entry: Entry, directories: set[str]) -> None:
    """Refuse one to a directory, which no file system makes; `directories` are those up to this entry."""
    if entry.kind == HARDLINK and entry.linkname in directories:
        where = f"its member {entry.path!r} is a hard link to {entry.linkname or '/'!r}"
        raise DamagedArchive(f"{where}, which is a directory")
    above = entry.path.rpartition("/")[0]
    while above not in directories:
        directories.add(above)
        above = above.rpartition("/")[0]
    if entry.kind == DIRECTORY:
        directories.add(entry.path)
    else:
        directories.discard(entry.path)


def refuse_container_image(source: Path | str, names: Set[str]) -> None:
    """Refuse what holds an image's layers and not its files, by the `names` at its top.

    Raises:
        InputError: it is an OCI image layout (image-layout.md of the specification), or from `docker save`.
    """
    kinds = (
        ({"oci-layout", "index.json"}, "an OCI image layout (oci-layout, index.json, blobs)"),
        ({"oci-layout", "blobs"}, "an OCI image layout (oci-layout, blobs)"),
        (
            {"manifest.json", "version"},
            "an image as skopeo writes it into a directory (manifest.json, version)",
        ),
        ({"manifest.json"}, "an image as `docker save` writes it (manifest.json)"),
        ({"repositories"}, _OLD),
    )
    for members, kind in kinds:
        if members <= names and not names & _ROOTS:
            hint = _SAVE_AGAIN if kind == _OLD else _LOAD
            raise InputError(f"{source} is {kind}, expected the files of a root directory", hint=hint)


_ROOTS: Final = frozenset({"bin", "etc", "lib", "usr"})
_OLD: Final = "an image as `docker save` wrote it before Docker 1.10 (repositories, without manifest.json)"
_SAVE_AGAIN: Final = (
    "`docker load` takes it, and what `docker save` writes then is for `firebuild images load`"
)
_LOAD: Final = "`firebuild images load` takes images with their layers, and FROM names them then"
_ZIP_HINT: Final = "unpack it, and import the directory"
# What people take for an archive of a root directory: offset, first bytes, what it is, and what to do.
_OTHERS: Final[tuple[tuple[int, bytes, str, str], ...]] = (
    (0, b"hsqs", "a SquashFS file system", "unpack it with `unsquashfs`, and import the directory"),
    (0, b"QFI\xfb", "a qcow2 disk image", "mount it, for example with guestmount, and import the directory"),
    (0, b"KDMV", "a VMDK disk image", "mount it, for example with guestmount, and import the directory"),
    (0, b"PK\x03\x04", "a zip archive", _ZIP_HINT),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _ZIP_HINT),
    (
        0,
        b"!<arch>\ndebian-binary",
        "a Debian package",
        "unpack it with `dpkg-deb -x`, or install it in a RUN",
    ),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "install it in a RUN"),
    (0, b"070701", "a cpio archive", "unpack it with `cpio -id`, and import the directory"),
    (0, b"\x7fELF", "a program", ""),
    (0, b"LZIP", "compressed with lzip", "compress it with xz, gzip, bzip2 or zstd"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", "compress it with xz, gzip, bzip2 or zstd"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system", "mount it, and import the directory"),
    (
        1080,
        b"\x53\xef",
        "an ext2, ext3 or ext4 file system",
        "mount it (`mount -o loop,ro`), and import the directory",
    ),
    (32769, b"CD001", "an ISO image", "mount it, and import the directory"),
    (510, b"\x55\xaa", "a disk image with partitions", "mount its root partition, and import the directory"),
)


def _refuse_others(archive: Path, source: Path | str) -> None:
    """Say what it is, if it is something else that people take for an archive."""
    with open(archive, "rb") as content:
        start = content.read(max(offset for offset, *_ in _OTHERS) + 16)
    for offset, magic, kind, hint in _OTHERS:
        if start.startswith(magic, offset):
            raise InputError(
                f"{source} is {kind}, expected a directory or a tar archive of a root directory",
                hint=hint or None,
            )


def _damaged(source: Path | str, why: str) -> InputError:
    return InputError(f"{source} is damaged: {why}", hint="make or download it again")
