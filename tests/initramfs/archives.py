"""Reads cpio archives back, by the text of the format and not by the code that writes them."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import zstandard


@dataclass(frozen=True)
class Found:
    path: str
    inode: int
    mode: int
    uid: int
    gid: int
    links: int
    time: int
    device: tuple[int, int]
    data: bytes


def read_cpio(data: bytes) -> list[Found]:
    found: list[Found] = []
    place = 0
    while True:
        assert data[place : place + 6] == b"070701", f"no header at {place}"
        numbers = [int(data[place + 6 + 8 * i : place + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, uid, gid, links, time, size, _, _, major, minor, name_size, check = numbers
        assert check == 0
        name_end = place + 110 + name_size
        assert data[name_end - 1] == 0
        path = data[place + 110 : name_end - 1].decode()
        start = -(-name_end // 4) * 4
        place = -(-(start + size) // 4) * 4
        if path == "TRAILER!!!":
            assert place == len(data)
            return found
        content = data[start : start + size]
        found.append(Found(path, inode, mode, uid, gid, links, time, (major, minor), content))


def read_initramfs(path: Path) -> list[Found]:
    return read_cpio(zstandard.ZstdDecompressor().decompress(path.read_bytes()))


def unpack(entries: list[Found], target: Path) -> Path:
    """Write everything but device nodes, which a user can't make."""
    for entry in entries:
        place = target / entry.path
        if stat.S_ISDIR(entry.mode):
            place.mkdir(parents=True)
            place.chmod(stat.S_IMODE(entry.mode))
        elif stat.S_ISLNK(entry.mode):
            place.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            place.write_bytes(entry.data)
            place.chmod(stat.S_IMODE(entry.mode))
    return target
