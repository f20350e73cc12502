"""Reading an ext4 file system image without mounting it.

The layout is that of the kernel's documentation (Documentation/filesystems/ext4). A guest wrote the image, so
nothing in it is believed: every number that leads somewhere is checked first.
"""

from __future__ import annotations

import bisect
import io
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from firebuild_bootstrap.layers.tar import LayerError

ROOT_INODE: Final = 2

_SUPERBLOCK: Final = 1024
_MAGIC: Final = 0xEF53
_EXTENT_MAGIC: Final = 0xF30A
_XATTR_MAGIC: Final = 0xEA020000
_MAX_DEPTH: Final = 5

# s_feature_incompat: what a reader has to know.
_FILETYPE, _RECOVER, _EXTENTS, _64BIT, _FLEX_BG = 0x2, 0x4, 0x40, 0x80, 0x200
_CSUM_SEED, _LARGEDIR = 0x2000, 0x4000
_KNOWN: Final = _FILETYPE | _RECOVER | _EXTENTS | _64BIT | _FLEX_BG | _CSUM_SEED | _LARGEDIR

# i_flags
_EXTENTS_FLAG: Final = 0x80000
_STRANGE_FLAGS: Final = 0x800 | 0x200000 | 0x10000000  # encrypted, value of an attribute, inline data

_XATTR_PREFIXES: Final = {
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
    7: "system.",
}


class Inode(NamedTuple):
    """A file. `block` is what the inode says about where its content is; `extra` holds small attributes."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    flags: int
    block: bytes
    attribute_block: int
    extra: bytes


class Extent(NamedTuple):
    """A run of blocks, by its first block in the file and on the disk; unwritten ones are zeros."""

    logical: int
    physical: int
    length: int
    written: bool


class Ext4Image:
    """An image, open for reading.

    Raises:
        LayerError: it is not an ext4 file system, was not unmounted, or uses unknown features.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 2 * _SUPERBLOCK:
                raise self._broken("too small")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        field = _fields(self._bytes[_SUPERBLOCK : 2 * _SUPERBLOCK])
        if field(0x38, "H") != _MAGIC:
            raise self._broken("it is not an ext4 file system")
        features = field(0x60, "I")
        if features & ~_KNOWN:
            raise self._broken(f"it uses unknown features ({features & ~_KNOWN:#x})")
        if features & _RECOVER:
            raise self._broken("it was not cleanly unmounted", "run e2fsck on it")
        if field(0x18, "I") > 6:
            raise self._broken("its blocks are larger than 64 KiB")
        self.block_size = 1024 << field(0x18, "I")
        self.inode_count = field(0x0, "I")
        self._inodes_per_group = field(0x28, "I")
        self._inode_size = field(0x58, "H")
        self._descriptor_size = max(32, field(0xFE, "H")) if features & _64BIT else 32
        self._descriptors = (field(0x14, "I") + 1) * self.block_size
        # What these are the sizes of is read by offsets; the kernel mounts no others.
        sizes = ((self._inode_size, 128, self.block_size), (self._descriptor_size, 32, 1024))
        if not self._inodes_per_group or not all(
            least <= size <= most and size.bit_count() == 1 for size, least, most in sizes
        ):
            raise self._broken("its superblock is invalid")

    def close(self) -> None:
        """Let go of the file."""
        self._bytes.close()

    def inode(self, number: int) -> Inode:
        """Read an inode by its number."""
        if not 0 < number <= self.inode_count:
            raise self._broken(f"there is no inode {number}")
        group, index = divmod(number - 1, self._inodes_per_group)
        at = self._descriptors + group * self._descriptor_size
        descriptor = _fields(self._range(at, self._descriptor_size))
        table = descriptor(0x8, "I")
        if self._descriptor_size >= 64:
            table |= descriptor(0x28, "I") << 32
        raw = self._range(table * self.block_size + index * self._inode_size, self._inode_size)
        return _parse_inode(number, raw)

    def content(self, inode: Inode) -> io.BufferedReader:
        """Open the content of a regular file."""
        return io.BufferedReader(FileContent(self, inode), buffer_size=1 << 20)

    def entries(self, inode: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield the names in a directory and their inodes, without `.` and `..`."""
        if inode.size > 1 << 31:
            raise self._broken(f"the directory in inode {inode.number} is too large")
        with self.content(inode) as content:
            while block := content.read(self.block_size):
                yield from self._entries_in(block, inode.number)

    def link_text(self, inode: Inode) -> bytes:
        """Read a symbolic link."""
        if inode.size < len(inode.block) and not inode.flags & _EXTENTS_FLAG:
            return inode.block[: inode.size]
        if inode.size > self.block_size:
            raise self._broken(f"the symbolic link in inode {inode.number} is too long")
        with self.content(inode) as content:
            return content.read()

    def xattrs(self, inode: Inode) -> dict[str, bytes]:
        """Read the extended attributes, in the form in which the kernel shows them to programs."""
        found: dict[str, bytes] = {}
        if len(inode.extra) >= 4 and _fields(inode.extra)(0, "I") == _XATTR_MAGIC:
            found.update(self._attributes(inode.extra[4:], inode.extra[4:], inode.number))
        if inode.attribute_block:
            block = self.block(inode.attribute_block)
            if _fields(block)(0, "I") != _XATTR_MAGIC:
                raise self._broken(f"the attributes of inode {inode.number} are damaged")
            found.update(self._attributes(block[32:], block, inode.number))
        return found

    def extents(self, inode: Inode) -> list[Extent]:
        """List the runs of blocks of a file, in order."""
        if inode.flags & _STRANGE_FLAGS or not inode.flags & _EXTENTS_FLAG:
            raise self._broken(f"the content of inode {inode.number} is kept in a way that is not known")
        found: list[Extent] = []
        for extent in self._extents_below(inode.block, inode.number, _MAX_DEPTH):
            if found and extent.logical < found[-1].logical + found[-1].length:
                raise self._broken(f"the extents of inode {inode.number} overlap")
            found.append(extent)
        return found

    def block(self, number: int) -> bytes:
        """Read one block."""
        return self._range(number * self.block_size, self.block_size)

    def _extents_below(self, node: bytes, inode: int, depth_limit: int) -> Iterator[Extent]:
        field = _fields(node)
        magic, count, depth = field(0, "H"), field(2, "H"), field(6, "H")
        empty = count == 0 and depth_limit < _MAX_DEPTH
        if magic != _EXTENT_MAGIC or depth > depth_limit or empty or 12 + 12 * count > len(node):
            raise self._broken(f"the extents of inode {inode} are damaged")
        for at in range(12, 12 + 12 * count, 12):
            if depth:
                child = field(at + 4, "I") | field(at + 8, "H") << 32
                yield from self._extents_below(self.block(child), inode, depth - 1)
            else:
                length = field(at + 4, "H")
                written = length <= 0x8000
                start = field(at + 8, "I") | field(at + 6, "H") << 32
                yield Extent(field(at, "I"), start, length if written else length - 0x8000, written)

    def _entries_in(self, block: bytes, inode: int) -> Iterator[tuple[bytes, int]]:
        at = 0
        while at + 8 <= len(block):
            number, length, name_length = struct.unpack_from("<IHB", block, at)
            if length < 8 or length % 4 or at + length > len(block) or 8 + name_length > length:
                raise self._broken(f"the directory in inode {inode} is damaged")
            name = block[at + 8 : at + 8 + name_length]
            at += length
            if number == 0 or name in (b".", b".."):
                continue
            if not name or b"/" in name or b"\0" in name:
                raise self._broken(f"the directory in inode {inode} has an impossible name: {name!r}")
            yield name, number

    def _attributes(self, entries: bytes, values: bytes, inode: int) -> Iterator[tuple[str, bytes]]:
        at = 0
        while at + 16 <= len(entries) and entries[at : at + 4] != b"\0\0\0\0":
            name_length, kind, offset, elsewhere, size = struct.unpack_from("<BBHII", entries, at)
            name = entries[at + 16 : at + 16 + name_length]
            if elsewhere or kind not in _XATTR_PREFIXES or offset + size > len(values):
                raise self._broken(f"the attributes of inode {inode} are damaged")
            key = _XATTR_PREFIXES[kind] + name.decode("utf-8", "surrogateescape")
            value = values[offset : offset + size]
            yield key, _acl(value) if kind in (2, 3) else value
            at += -(-(16 + name_length) // 4) * 4

    def _range(self, start: int, length: int) -> bytes:
        if start < 0 or start + length > len(self._bytes):
            raise self._broken("something in it points beyond its end")
        return self._bytes[start : start + length]

    def _broken(self, what: str, hint: str = "") -> LayerError:
        return LayerError(f"{self.path} cannot be read as ext4: {what}", hint)


class FileContent(io.RawIOBase):
    """The content of a file, without a buffer."""

    def __init__(self, image: Ext4Image, inode: Inode) -> None:
        super().__init__()
        self._image = image
        self._size = inode.size
        self._extents = image.extents(inode) if inode.size else []
        self._starts = [extent.logical * image.block_size for extent in self._extents]
        self._at = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def data(self) -> Iterator[tuple[int, int]]:
        """Yield (first byte, byte after the last) of everything that may not be zeros."""
        block = self._image.block_size
        for extent in self._extents:
            if extent.written:
                yield extent.logical * block, (extent.logical + extent.length) * block

    def read_at(self, size: int, offset: int) -> bytes:
        """Return up to `size` bytes from `offset`."""
        self._at = offset
        pieces = []
        while size and (piece := self.read(size)):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase."""
        block = self._image.block_size
        length = min(len(buffer), self._size - self._at)
        if length <= 0:
            return 0
        data: bytes | None = None
        index = bisect.bisect_right(self._starts, self._at) - 1
        extent = self._extents[index] if index >= 0 else None
        if extent is not None and self._at < (extent.logical + extent.length) * block:
            inside = self._at - extent.logical * block
            length = min(length, extent.length * block - inside)
            if extent.written:
                data = self._image._range(extent.physical * block + inside, length)
        elif index + 1 < len(self._starts):
            length = min(length, self._starts[index + 1] - self._at)
        buffer[:length] = bytes(length) if data is None else data
        self._at += length
        return length


def _parse_inode(number: int, raw: bytes) -> Inode:
    field = _fields(raw)
    mode = field(0x0, "H")
    nanoseconds, epoch, extra = 0, 0, b""
    if len(raw) > 128:
        extra_size = field(0x80, "H")
        if extra_size >= 12:
            bits = field(0x88, "I")
            nanoseconds, epoch = bits >> 2, bits & 3
        extra = raw[128 + extra_size :]
    return Inode(
        number,
        mode,
        field(0x2, "H") | field(0x78, "H") << 16,
        field(0x18, "H") | field(0x7A, "H") << 16,
        field(0x4, "I") | field(0x6C, "I") << 32,
        (field(0x10, "i") + (epoch << 32)) * 10**9 + min(nanoseconds, 10**9 - 1),
        field(0x1A, "H"),
        field(0x20, "I"),
        raw[0x28:0x64],
        field(0x68, "I") | field(0x76, "H") << 32,
        extra,
    )


def device_of(inode: Inode) -> int:
    """Return the device number of a device node: the old short form, or the new long one."""
    old, new = struct.unpack_from("<II", inode.block)
    if not stat.S_ISCHR(inode.mode) and not stat.S_ISBLK(inode.mode):
        return 0
    if old:
        return os.makedev(old >> 8 & 0xFF, old & 0xFF)
    return os.makedev((new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00))


def _acl(value: bytes) -> bytes:
    """Turn an access control list from its form on the disk into that of the system calls."""
    if len(value) < 4:
        return value
    entries, at = [struct.pack("<I", 2)], 4
    while at + 4 <= len(value):
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        who = 0xFFFFFFFF
        if tag in (0x2, 0x8) and at + 4 <= len(value):  # a named user or group
            (who,) = struct.unpack_from("<I", value, at)
            at += 4
        entries.append(struct.pack("<HHI", tag, permissions, who))
    return b"".join(entries)


class _fields:  # noqa: N801 - used like a function
    """Little-endian numbers in a structure, by offset."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def __call__(self, offset: int, form: str) -> int:
        (value,) = struct.unpack_from(f"<{form}", self._raw, offset)
        return int(value)
