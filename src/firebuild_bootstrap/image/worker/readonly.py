"""Tree -> EROFS or squashfs image, by the programs of those file systems."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from struct import pack, unpack_from
from tempfile import TemporaryFile
from typing import IO, Final, cast
from uuid import UUID

from firebuild_bootstrap.image.worker.ext4layout import content_uuid
from firebuild_bootstrap.layers.tar import BLOCK, Content, Entry, LayerError, encode, write_layer
from firebuild_bootstrap.layers.tree import Files, tree_entries

PROGRAMS: Final = {"erofs": ("mkfs.erofs", "erofs-utils"), "squashfs": ("sqfstar", "squashfs-tools")}
"""The program that writes a form, and Debian's package of it."""
_SYSTEM: Final = ("/usr/sbin", "/sbin")  # not on everybody's PATH
_SECOND: Final = 10**9
_YOUNGEST: Final = (1 << 32) - 1  # squashfs counts seconds from 1970 in 32 bits


def make_readonly(form: str, root: str, image: str, newest: int | None) -> None:
    """Write the tree `root` into the new file `image`: the same bytes for the same tree.

    Args:
        form: erofs or squashfs.
        root: the tree.
        image: path of the file.
        newest: see `tree_entries`.

    Raises:
        LayerError: the program is missing or failed.
        OSError: the tree can't be read.
    """
    if form == "erofs":
        _erofs(root, image, newest)
    else:
        _squashfs(tree_entries(root, newest=newest), image)


def _erofs(root: str, image: str, newest: int | None) -> None:
    found = hashlib.sha256()
    last = 0
    for entry, _ in tree_entries(root, newest=newest):
        found.update(encode(entry, entry.stored)[0])
        last = max(last, -(-entry.mtime_ns // _SECOND))
    # It takes the tree itself: tar streams are read from version 1.7 on only.
    command = ["mkfs.erofs", "--quiet", "-U", str(UUID(bytes=content_uuid(found.digest()))), image, root]
    # Later times become this one, and so does that of the file system; -T would set all of them.
    _run(command, {"SOURCE_DATE_EPOCH": str(last if newest is None else newest)})


def _squashfs(files: Files, image: str) -> None:
    root, content = next(files)
    # In an archive it takes no notice of the root.
    options = f"-root-mode {root.mode:o} -root-uid {root.uid} -root-gid {root.gid}"
    # While it looks for duplicates, sqfstar 4.5 writes a damaged image once in some hundred times.
    options += " -mkfs-time 0 -noI -quiet -no-progress -no-duplicates"
    entries = (
        (_readable(entry)._replace(mtime_ns=_in_range(entry.mtime_ns)), data)
        for entry, data in chain([(root, content)], files)
    )
    _run(["sqfstar", *options.split(), image], {}, entries)
    _set_root_time(image, _in_range(root.mtime_ns) // _SECOND)


def _readable(entry: Entry) -> Entry:
    """Return an entry as sqfstar can read it, which makes holes of zeros by itself.

    Version 4.5 skips what fills the last block of a file with holes twice: it would lose its place.
    """
    fills = entry.size % BLOCK == 0 == entry.stored % BLOCK
    return entry if fills else entry._replace(regions=None)


def _set_root_time(image: str, seconds: int) -> None:
    """Set the time of the root, which is that of now: sqfstar 4.5 has -root-time, and does nothing with it.

    Inodes are in blocks of 8192 bytes, each behind two bytes of its length, and not compressed (-noI). The
    superblock says where that of the root is, and where the first of all is.
    """
    with open(image, "r+b") as file:
        head = file.read(96)
        reference, table = unpack_from("<Q", head, 32)[0], unpack_from("<Q", head, 64)[0]
        for number, byte in enumerate(pack("<I", seconds)):
            whole, rest = divmod((reference & 0xFFFF) + 8 + number, 8192)
            file.seek(table + (reference >> 16) + whole * 8194 + 2 + rest)
            file.write(bytes([byte]))


def _in_range(mtime_ns: int) -> int:
    return min(max(mtime_ns, 0), _YOUNGEST * _SECOND)


def _run(command: Sequence[str], env: Mapping[str, str], files: Iterable[tuple[Entry, Content]] = ()) -> None:
    """Run a program, and give it `files` as a tar archive."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM])
    with TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                command,
                env={"PATH": path, "LC_ALL": "C", **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
            )
        except FileNotFoundError as error:
            package = next(package for program, package in PROGRAMS.values() if program == command[0])
            raise LayerError(
                f"the program {command[0]} was not found", f"install the package {package}"
            ) from error
        with suppress(BrokenPipeError), process:  # it has ended then, and says why
            write_layer(cast(IO[bytes], process.stdin), files)
        if process.returncode:
            complaints.seek(0)
            text = complaints.read().decode("utf-8", "replace").strip()[:500]
            raise LayerError(f"{command[0]} failed: {text or f'it ended with {process.returncode}'}")
