"""Tree -> EROFS or squashfs image, by the programs of those file systems."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from tempfile import TemporaryFile
from typing import IO, Final, cast
from uuid import UUID

from firebuild_bootstrap.image.worker.ext4layout import content_uuid
from firebuild_bootstrap.layers.tar import Content, Entry, LayerError, encode, write_layer
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
    found = hashlib.sha256()
    last = 0
    for entry, _ in tree_entries(root, newest=newest):
        found.update(encode(entry, entry.stored)[0])
        last = max(last, -(-entry.mtime_ns // _SECOND))
    if form == "erofs":
        # It takes the tree itself: tar streams are read from version 1.7 on only.
        command = ["mkfs.erofs", "--quiet", "-U", str(UUID(bytes=content_uuid(found.digest()))), image, root]
        # Later times become this one, and so does that of the file system; -T would set all of them.
        _run(command, last if newest is None else newest)
    else:
        _squashfs(tree_entries(root, newest=newest), image, min(last, _YOUNGEST))


def _squashfs(files: Files, image: str, last: int) -> None:
    root, content = next(files)
    # Of the root, sqfstar takes no notice in an archive, and 4.5 none of -root-time: it has the time of now,
    # which becomes that of the youngest file as later times do.
    options = f"-root-mode {root.mode:o} -root-uid {root.uid} -root-gid {root.gid} -quiet -no-progress"
    entries = (
        (entry._replace(mtime_ns=_in_range(entry.mtime_ns)), data)
        for entry, data in chain([(root, content)], files)
    )
    _run(["sqfstar", *options.split(), image], last, entries)


def _in_range(mtime_ns: int) -> int:
    return min(max(mtime_ns, 0), _YOUNGEST * _SECOND)


def _run(command: Sequence[str], epoch: int, files: Iterable[tuple[Entry, Content]] = ()) -> None:
    """Run a program with SOURCE_DATE_EPOCH, and give it `files` as a tar archive."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM])
    with TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                command,
                env={"PATH": path, "LC_ALL": "C", "SOURCE_DATE_EPOCH": str(epoch)},
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
