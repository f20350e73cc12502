"""Writes cpio archives in the form that Linux unpacks as an initramfs ("newc").

Linux documentation, driver-api/early-userspace/buffer-format.rst; cpio(5).
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Iterable
from typing import IO, Final

from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_LIMIT: Final = 0xFFFFFFFF
_ALIGNMENT: Final = 4


@dataclass(frozen=True)
class Entry:
    """One file of an archive; it belongs to root and has the time 0.

    Args:
        path: relative, without `.` and `..`.
        mode: type and permissions, as in `st_mode`.
        data: content of a file, text of a link.
        device: major and minor number of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """Return a regular file."""
    return Entry(path, stat.S_IFREG | mode, data)


def directory(path: str, mode: int = 0o755) -> Entry:
    """Return a directory."""
    return Entry(path, stat.S_IFDIR | mode)


def link(path: str, text: str) -> Entry:
    """Return a symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, text.encode())


def character_device(path: str, mode: int, major: int, minor: int) -> Entry:
    """Return a node of a character device."""
    return Entry(path, stat.S_IFCHR | mode, device=(major, minor))


def write_archive(entries: Iterable[Entry], target: IO[bytes]) -> None:
    """Write an archive that depends on nothing but the entries: sorted, numbered, with all parents.

    Args:
        entries: in any order; directories that are only implied get mode 0755.
        target: takes the bytes.

    Raises:
        ValueError: two entries have the same path, a path leaves the archive, or a file is too large for the
            format (4 GiB).
    """
    number = 0
    for number, entry in enumerate(_sorted(entries), start=1):
        _write(target, entry, number)
    _write(target, Entry(_TRAILER, 0), number + 1)


def _sorted(entries: Iterable[Entry]) -> list[Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        if posixpath.normpath(entry.path) != entry.path or entry.path.startswith(("/", "..")):
            raise ValueError(f"{entry.path!r} is not a path inside an archive")
        if entry.path in found:
            raise ValueError(f"two files want to be {entry.path!r}")
        found[entry.path] = entry
    for path in list(found):
        parent = posixpath.dirname(path)
        while parent:
            found.setdefault(parent, directory(parent))
            parent = posixpath.dirname(parent)
    # By components, so that a directory comes before what is in it.
    return sorted(found.values(), key=lambda entry: entry.path.split("/"))


def _write(target: IO[bytes], entry: Entry, number: int) -> None:
    if len(entry.data) > _LIMIT:
        raise ValueError(f"{entry.path!r} has {counted(len(entry.data), 'byte')}, and {_LIMIT} fit")
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(number, entry.mode, 0, 0, links, 0, len(entry.data)),  # uid, gid and time are 0
        *(0, 0, *entry.device, len(name), 0),
    )
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    target.write(_padded(header + name))
    target.write(_padded(entry.data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
