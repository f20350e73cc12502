"""Tree -> EROFS or squashfs image, by the programs of those file systems."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from struct import pack, unpack_from
from threading import Thread
from typing import IO, Final, cast
from uuid import UUID

from firebuild_bootstrap.image.worker.ext4layout import content_uuid
from firebuild_bootstrap.layers.tar import BLOCK, Content, Entry, LayerError, encode, escaped, write_layer
from firebuild_bootstrap.layers.tree import Files, tree_entries

PROGRAMS: Final = {"erofs": ("mkfs.erofs", "erofs-utils"), "squashfs": ("sqfstar", "squashfs-tools")}
"""The program that writes a form, and Debian's package of it."""
_SYSTEM: Final = ("/usr/sbin", "/sbin")  # not on everybody's PATH
_TAKES_TAR: Final = (1, 7)  # from this version on mkfs.erofs reads whole tar archives
_WHOLE_NAMES: Final = (1, 8, 5)  # before it mkfs.erofs cuts off the last byte of the longest names
_LONGEST_NAME: Final = 255
_MOST_SAID: Final = 64 * 1024
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
    version = _erofs_version()
    found = hashlib.sha256()
    last = 0
    for entry, _ in tree_entries(root, newest=newest):
        if version < _TAKES_TAR:
            _check_owner(entry, _status(root, entry.path, version), version)
            _check_time(entry, version)
        if version < _WHOLE_NAMES:
            _check_name(entry, version)
        found.update(encode(entry, entry.stored)[0])
        last = max(last, -(-entry.mtime_ns // _SECOND))
    command = ["mkfs.erofs", "--quiet", "-U", str(UUID(bytes=content_uuid(found.digest()))), image]
    # Later times become this one, and so does that of the file system; -T would set all of them.
    env = {"SOURCE_DATE_EPOCH": str(last if newest is None else newest)}
    if version < _TAKES_TAR:
        _run([*command, root], env)
        return
    files = ((_erofs_readable(entry), data) for entry, data in tree_entries(root, newest=newest))
    _run([*command, "--tar=f", "-b4096"], env, files)


def _erofs_readable(entry: Entry) -> Entry:
    """Return an entry as mkfs.erofs 1.8 can read it, which knows no sparse members.

    Of a time it takes the digits after the point for nanoseconds, however few they are: so there have to be
    nine or none, and where zeros at the end are left out the time is a nanosecond later. One before 1970
    counts as later than all others there.
    """
    _check_attributes(entry, "mkfs.erofs")
    mtime_ns = max(entry.mtime_ns, 0)
    late = mtime_ns % _SECOND > 0 and mtime_ns % 10 == 0
    return entry._replace(regions=None, mtime_ns=mtime_ns + late)


def _erofs_version() -> tuple[int, int, int]:
    """Return the version of mkfs.erofs; the first ones know no --version, and tell it with their usage."""
    said = _run(["mkfs.erofs", "--version"], {}, fails=True)
    version = re.search(r"\b([0-9]+)\.([0-9]+)(?:\.([0-9]+))?", said)
    return (int(version[1]), int(version[2]), int(version[3] or 0)) if version else (0, 0, 0)


def _check_name(entry: Entry, version: tuple[int, int, int]) -> None:
    name = os.fsencode(entry.path).rpartition(b"/")[2]
    if len(name) >= _LONGEST_NAME:
        raise LayerError(
            f"the name of /{entry.path[:200]}… has {_LONGEST_NAME} bytes, and mkfs.erofs "
            f"{'.'.join(map(str, version))} cuts off the last",
            "install erofs-utils 1.8.5 or newer, or write squashfs or ext4",
        )


def _status(root: str, path: str, version: tuple[int, int, int]) -> os.stat_result:
    try:
        return os.lstat(f"{root}/{path}")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise LayerError(
            f"/{path[:200]}… is a longer path than mkfs.erofs {version[0]}.{version[1]} can read",
            "install erofs-utils 1.7 or newer, or write squashfs or ext4",
        ) from error


def _check_owner(entry: Entry, status: os.stat_result, version: tuple[int, int, int]) -> None:
    """Insist that a file has the owner on the disk that it is to have, where it is taken from there."""
    if (entry.uid, entry.gid) != (status.st_uid, status.st_gid):
        raise LayerError(
            f"{entry.path} belongs to {entry.uid}:{entry.gid}, which this user can't have on the disk, and "
            f"mkfs.erofs {version[0]}.{version[1]} takes owners from there",
            "install erofs-utils 1.7 or newer, give your user subordinate ids, or write squashfs",
        )


def _check_time(entry: Entry, version: tuple[int, int, int]) -> None:
    """Insist on a time from 1970 on, where it is taken from the disk: mkfs.erofs reads it without a sign."""
    if entry.mtime_ns < 0:
        raise LayerError(
            f"/{entry.path} is from before 1970, which mkfs.erofs {version[0]}.{version[1]} takes for later "
            "than all other times",
            "install erofs-utils 1.7 or newer, `touch` the file, or write squashfs or ext4",
        )


def _check_attributes(entry: Entry, program: str) -> None:
    """Insist on names of attributes that a program which knows nothing of `escaped` reads as they are."""
    for name in entry.xattrs:
        if name != escaped(name):
            raise LayerError(
                f"/{entry.path} has the extended attribute {name!r}, whose name {program} would change",
                "give it another name, or write ext4",
            )


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
    _check_attributes(entry, "sqfstar")
    fills = entry.size % BLOCK == 0 == entry.stored % BLOCK
    return entry if fills else entry._replace(regions=None)


def _set_root_time(image: str, seconds: int) -> None:
    """Set the time of the root, which is that of now: sqfstar 4.5 has -root-time, and does nothing with it.

    Inodes are in blocks of 8192 bytes, each after two bytes of its length, and not compressed (-noI). The
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


def _run(
    command: Sequence[str],
    env: Mapping[str, str],
    files: Iterable[tuple[Entry, Content]] = (),
    *,
    fails: bool = False,
) -> str:
    """Run a program, give it `files` as a tar archive, and return what it says.

    Args:
        command: the program and its arguments.
        env: variables besides PATH and LC_ALL.
        files: for its standard input.
        fails: it may.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SYSTEM])
    try:
        process = subprocess.Popen(
            command,
            env={"PATH": path, "LC_ALL": "C", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        from firebuild_bootstrap.programs import start_hint, start_problem

        package = next(package for program, package in PROGRAMS.values() if program == command[0])
        hint = start_hint(error, f"install the package {package}")
        raise LayerError(start_problem(command[0], error), hint) from error
    said = bytearray()
    with process:
        reading = Thread(target=_listen, args=(process.stdout, said))
        reading.start()
        try:
            with suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as asked:
                write_layer(asked, files)  # where the pipe is broken, the program has ended, and says why
        finally:
            reading.join()
    text = said.decode("utf-8", "replace").strip()
    if process.returncode and not fails:
        raise LayerError(f"{command[0]} failed: {text[:500] or f'it ended with {process.returncode}'}")
    return text


def _listen(output: IO[bytes], said: bytearray) -> None:
    """Keep the beginning of what a program writes: it may have a line for each of a million files."""
    while piece := output.read(_MOST_SAID):
        said += piece[: _MOST_SAID - len(said)]
