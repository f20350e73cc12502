"""What ext4 keeps of a file: inode, map of its blocks, extended attributes, directory.

The layout is that of the kernel's documentation (Documentation/filesystems/ext4). Everything here takes
values and returns bytes; where they go is the business of `ext4`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from struct import Struct, pack, pack_into, unpack_from
from typing import Final

from firebuild_bootstrap.image.worker.ext4hash import advance, crc32c, half_md4
from firebuild_bootstrap.layers.tar import LayerError

BLOCK_SIZE: Final = 4096
INODE_SIZE: Final = 256
EXTENTS_FLAG: Final = 0x80000
INDEX_FLAG: Final = 0x1000
CHECKSUM_PLACES: Final = (0x7C, 0x7D, 0x82, 0x83)
"""Where an inode has the bytes of its checksum, the lowest first."""
LINKS_PLACE: Final = 0x1A
"""Where it has the number of its names."""
MAX_LINKS: Final = 65000
MAX_NAME: Final = 255

Run = tuple[int, int, int]
"""Blocks of a file: the first one in the file, the first one on the disk, how many."""

_INODE: Final = Struct("<2H5I2H3I60s4I6H2H7I96s")
_EXTRA_SIZE: Final = 32  # of the fields after the first 128 bytes
_ERA: Final = 1 << 32
_OLDEST: Final = -(_ERA // 2)
_YOUNGEST: Final = 4 * _ERA - _ERA // 2 - 1  # in the year 2446


def inode(
    mode: int,
    owner: tuple[int, int],
    mtime_ns: int,
    *,
    size: int = 0,
    links: int = 1,
    blocks: int = 0,
    flags: int = 0,
    content: bytes = b"",
    attribute_block: int = 0,
    attributes: bytes = b"",
) -> bytes:
    """Return an inode without its checksum.

    Args:
        mode: with the type of the file.
        owner: user and group by number.
        mtime_ns: nanoseconds since 1970; all its times are this one, as a layer has no other.
        size: of its content, in bytes.
        links: number of its names.
        blocks: those of 4096 bytes that it takes, those of its map and attributes included.
        flags: EXTENTS_FLAG, INDEX_FLAG.
        content: up to 60 bytes: the map of its blocks, the text of a link, a device number.
        attribute_block: number of the block with further extended attributes; 0 for none.
        attributes: up to 96 bytes, see `attributes`.
    """
    uid, gid = owner
    seconds, nanoseconds = divmod(mtime_ns, 10**9)
    if not _OLDEST <= seconds <= _YOUNGEST:
        seconds, nanoseconds = (_OLDEST, 0) if seconds < 0 else (_YOUNGEST, 0)
    low = seconds & 0xFFFFFFFF
    # Two bits of the epoch, counted from the signed 32 bits (kernel documentation, "Inode Timestamps").
    extra = nanoseconds << 2 | (seconds + _ERA // 2) >> 32
    sectors = blocks * 8
    return _INODE.pack(
        *(mode, uid & 0xFFFF, size & 0xFFFFFFFF, low, low, low, 0, gid & 0xFFFF, links),
        *(sectors & 0xFFFFFFFF, flags, 0, content, 0, attribute_block & 0xFFFFFFFF, size >> 32, 0),
        *(sectors >> 32, attribute_block >> 32, uid >> 16, gid >> 16, 0, 0),
        *(_EXTRA_SIZE, 0, extra, extra, extra, low, extra, 0, 0, attributes),
    )


def device(path: str, major: int, minor: int) -> bytes:
    """Return what the inode of a device node has as its content: the old form where it fits, as the kernel.

    Raises:
        LayerError: there are no such numbers in ext4.
    """
    if major < 256 and minor < 256:
        return pack("<II", major << 8 | minor, 0)
    if major >= 1 << 12 or minor >= 1 << 20:
        raise LayerError(f"/{path}: a device {major}:{minor} can't be in an ext4 file system")
    return pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


# The map of a file's blocks. ------------------------------------------------------------------------------

_EXTENT_MAGIC: Final = 0xF30A
_IN_INODE: Final = 4
_IN_BLOCK: Final = 340
_EXTENT_BLOCKS: Final = 1 << 15  # of one extent at most
NO_EXTENTS: Final = pack("<HHHHI", _EXTENT_MAGIC, 0, _IN_INODE, 0, 0)


def one_extent(start: int, count: int) -> bytes:
    """Return the map of a file that has its `count` blocks, up to 32768, in one place."""
    return pack("<HHHHIIHHI", _EXTENT_MAGIC, 1, _IN_INODE, 0, 0, 0, count, start >> 32, start & 0xFFFFFFFF)


def extent_map(runs: Sequence[Run], write: Callable[[bytes], int]) -> tuple[bytes, int]:
    """Return the map that goes into the inode, and how many further blocks it takes.

    Args:
        runs: the blocks of the file in order.
        write: puts a block of the map, which has no checksum yet, somewhere and returns its number.
    """
    entries = [
        (
            logical + done,
            pack("<IHHI", logical + done, min(count - done, _EXTENT_BLOCKS), *_split(start + done)),
        )
        for logical, start, count in runs
        for done in range(0, count, _EXTENT_BLOCKS)
    ]
    depth = blocks = 0
    while len(entries) > _IN_INODE:
        above = []
        for at in range(0, len(entries), _IN_BLOCK):
            some = entries[at : at + _IN_BLOCK]
            number = write(_extents(some, _IN_BLOCK, depth).ljust(BLOCK_SIZE, b"\0"))
            high, low = _split(number)
            above.append((some[0][0], pack("<IIHH", some[0][0], low, high, 0)))
        blocks += len(above)
        entries = above
        depth += 1
    return _extents(entries, _IN_INODE, depth), blocks


def _extents(entries: Sequence[tuple[int, bytes]], room: int, depth: int) -> bytes:
    head = pack("<HHHHI", _EXTENT_MAGIC, len(entries), room, depth, 0)
    return head + b"".join(data for _, data in entries)


def _split(number: int) -> tuple[int, int]:
    return number >> 32, number & 0xFFFFFFFF


def extent_block_checksum(seed: int, block: bytes) -> bytes:
    """Return the last four bytes of a block of a map; `seed` is that of the inode."""
    return pack("<I", crc32c(seed, block[:-4]))


# Extended attributes. -------------------------------------------------------------------------------------

_XATTR_MAGIC: Final = 0xEA020000
_ACCESS_LISTS: Final = {"system.posix_acl_access": 2, "system.posix_acl_default": 3}
_PREFIXES: Final = {"user.": 1, "trusted.": 4, "security.": 6, "system.": 7}
_NAMED: Final = (0x2, 0x8)  # entries of an access control list with a user or group
_ROOM_IN_INODE: Final = INODE_SIZE - 128 - _EXTRA_SIZE - 4 - 4  # without magic number and end mark
_ROOM_IN_BLOCK: Final = BLOCK_SIZE - 32 - 4


def attributes(path: str, xattrs: Mapping[str, bytes]) -> tuple[bytes, bytes]:
    """Return what of extended attributes goes into the inode, and the block that has the others, if any.

    Args:
        path: of their file, for the error.
        xattrs: in the form of the system calls.

    Raises:
        LayerError: there is no room for all of them, or ext4 has none of that name.
    """
    entries = sorted((_attribute(path, name, value) for name, value in xattrs.items()), key=_order)
    inside: list[_Attribute] = []
    outside: list[_Attribute] = []
    rooms = [_ROOM_IN_INODE, _ROOM_IN_BLOCK]
    for entry in sorted(entries, key=lambda entry: (_cost(entry), _order(entry))):
        place = 0 if _cost(entry) <= rooms[0] else 1
        rooms[place] -= _cost(entry)
        (outside if place else inside).append(entry)
    if rooms[1] < 0:
        raise LayerError(
            f"/{path} has more extended attributes than an ext4 file system can hold ({BLOCK_SIZE} bytes)",
            "remove some, or choose another form",
        )
    in_inode = pack("<I", _XATTR_MAGIC) + _attributes(inside, INODE_SIZE - 128 - _EXTRA_SIZE - 4, 0)
    if not outside:
        return in_inode if inside else b"", b""
    outside.sort(key=_order)  # a reader of the block relies on it
    body = _attributes(outside, BLOCK_SIZE - 32, 32)
    total = 0
    for entry in outside:
        total = (total << 16 ^ total >> 16 ^ _attribute_hash(entry)) & 0xFFFFFFFF
    return in_inode if inside else b"", pack("<IIIIII8x", _XATTR_MAGIC, 1, 1, total, 0, 0) + body


def attribute_block_checksum(seed: int, number: int, block: bytes) -> bytes:
    """Return bytes 16 to 20 of a block of attributes; `seed` is that of the file system."""
    return pack("<I", crc32c(crc32c(seed, pack("<Q", number)), block))


_Attribute = tuple[int, bytes, bytes]


def _attribute(path: str, name: str, value: bytes) -> _Attribute:
    if name in _ACCESS_LISTS:
        return _ACCESS_LISTS[name], b"", _access_list(path, name, value)
    prefix, dot, rest = name.partition(".")
    kind = _PREFIXES.get(prefix + dot)
    text = rest.encode("utf-8", "surrogateescape")
    if kind is None or not 0 < len(text) <= MAX_NAME or "\0" in rest:
        raise LayerError(f"/{path}: ext4 has no extended attribute {name!r}")
    return kind, text, value


def _order(entry: _Attribute) -> tuple[int, int, bytes]:
    return entry[0], len(entry[1]), entry[1]


def _cost(entry: _Attribute) -> int:
    return 16 + (len(entry[1]) + 3 & ~3) + (len(entry[2]) + 3 & ~3)


def _attributes(entries: Sequence[_Attribute], length: int, base: int) -> bytes:
    """Return descriptions, growing from the begin, and values, growing from the end; `base` is in front."""
    area = bytearray(length)
    at, end = 0, length
    for entry in entries:
        kind, name, value = entry
        end -= len(value) + 3 & ~3
        # In an inode nobody looks at the hash, and the kernel writes none.
        mark = _attribute_hash(entry) if base else 0
        pack_into("<BBHIII", area, at, len(name), kind, base + end if value else 0, 0, len(value), mark)
        area[at + 16 : at + 16 + len(name)] = name
        area[end : end + len(value)] = value
        at += 16 + (len(name) + 3 & ~3)
    return bytes(area)


def _attribute_hash(entry: _Attribute) -> int:
    _, name, value = entry
    mixed = 0
    for byte in name:
        mixed = (mixed << 5 ^ mixed >> 27 ^ byte) & 0xFFFFFFFF
    padded = value + bytes(-len(value) % 4)
    for (word,) in Struct("<I").iter_unpack(padded):
        mixed = (mixed << 16 ^ mixed >> 16 ^ word) & 0xFFFFFFFF
    return mixed


def _access_list(path: str, name: str, value: bytes) -> bytes:
    """Turn an access control list from the form of the system calls into that on the disk."""
    if len(value) < 4 or len(value) % 8 != 4 or value[:4] != b"\2\0\0\0":
        raise LayerError(f"/{path}: {name} is not an access control list")
    entries = [pack("<I", 1)]
    for at in range(4, len(value), 8):
        short = unpack_from("<H", value, at)[0] not in _NAMED
        entries.append(value[at : at + 4] if short else value[at : at + 8])
    return b"".join(entries)


# Directories. ---------------------------------------------------------------------------------------------

_TAIL: Final = 12  # what looks like an entry and holds the checksum
_ROOM: Final = BLOCK_SIZE - _TAIL
_ROOT_INDEX, _INNER_INDEX = 32, 8  # where the index begins in the first block and in inner ones
_HASHED_AT_ONCE: Final = 4096
DIRECTORY_TYPE: Final = 2
_HEADS: Final = Struct("<IHBB")


def dirent(number: int, name: bytes, kind: int) -> bytes:
    """Return an entry of a directory, as short as it can be."""
    length = 8 + len(name) + 3 & ~3
    return _HEADS.pack(number, length, len(name), kind) + name + bytes(length - 8 - len(name))


def directory(number: int, parent: int, entries: bytes, seed: int, hash_seed: bytes) -> tuple[bytes, int]:
    """Return the content of a directory, and its flags.

    One that does not fit into a block gets an index, as the kernel would make it: without, each look-up
    would read half of the directory.

    Args:
        number: its inode.
        parent: inode of the directory above.
        entries: one `dirent` after the other.
        seed: of the checksums, for this inode.
        hash_seed: of the file system.

    Raises:
        LayerError: it has more entries than an index of two levels can hold.
    """
    dots = dirent(number, b".", DIRECTORY_TYPE) + dirent(parent, b"..", DIRECTORY_TYPE)
    if len(dots) + len(entries) <= _ROOM:
        places = _places(entries)
        return _leaf(dots + entries, len(dots) + places[-1] if places else 12, seed), 0
    leaves = list(_leaves(entries, hash_seed))
    inner = 0
    blocks = b"".join(_leaf(data, last, seed) for _, data, last in leaves)
    index = [(first, place) for place, (first, _, _) in enumerate(leaves, 1)]
    if len(index) > _index_room(_ROOT_INDEX):
        room = _index_room(_INNER_INDEX)
        above = []
        for at in range(0, len(index), room):
            above.append((index[at][0], 1 + len(index) + inner))
            inner += 1
            blocks += _index(pack("<IHBB", 0, BLOCK_SIZE, 0, 0), index[at : at + room], seed)
        index = above
    if len(index) > _index_room(_ROOT_INDEX):
        raise LayerError(f"the directory in inode {number} has too many entries for an ext4 file system")
    dots = dots[:12] + pack("<IHBB4s", parent, BLOCK_SIZE - 12, 2, DIRECTORY_TYPE, b"..")
    head = dots + pack("<IBBBB", 0, 1, 8, 1 if inner else 0, 0)
    return _index(head, index, seed) + blocks, INDEX_FLAG


def _places(entries: bytes) -> list[int]:
    places = []
    at = 0
    while at < len(entries):
        places.append(at)
        at += entries[at + 4] | entries[at + 5] << 8
    return places


def _leaf(data: bytes, last: int, seed: int) -> bytes:
    """Return a block of entries, the last of which, at `last`, reaches to its end."""
    block = bytearray(data)
    pack_into("<H", block, last + 4, _ROOM - last)
    checksum = advance(crc32c(seed, block), _ROOM - len(block))
    return bytes(block.ljust(_ROOM, b"\0")) + pack("<IHBBI", 0, _TAIL, 0, 0xDE, checksum)


def _leaves(entries: bytes, hash_seed: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield the lowest hash in a leaf, its entries, and where the last of them begins."""
    places = _places(entries)
    order: list[tuple[int, int, int]] = []
    for at in range(0, len(places), _HASHED_AT_ONCE):
        some = places[at : at + _HASHED_AT_ONCE]
        hashes = half_md4([entries[each + 8 : each + 8 + entries[each + 6]] for each in some], hash_seed)
        order += [(major, minor, place) for (major, minor), place in zip(hashes, some, strict=True)]
    del places
    order.sort()
    first, size, last, begin = 0, 0, 0, 0
    for number, (major, _, place) in enumerate(order):
        length = entries[place + 4] | entries[place + 5] << 8
        if size + length > _ROOM:
            yield first, b"".join(map(_entry_at(entries), order[begin:number])), last
            # The lowest bit says that names of the same hash are in the leaf before.
            first, size, begin = major | (order[number - 1][0] == major), 0, number
        last = size
        size += length
    yield first, b"".join(map(_entry_at(entries), order[begin:])), last


def _entry_at(entries: bytes) -> Callable[[tuple[int, int, int]], bytes]:
    def entry(found: tuple[int, int, int]) -> bytes:
        place = found[2]
        return entries[place : place + (entries[place + 4] | entries[place + 5] << 8)]

    return entry


def _index_room(begin: int) -> int:
    return (BLOCK_SIZE - begin - 8) // 8  # the checksum takes the last eight bytes


def _index(head: bytes, index: Sequence[tuple[int, int]], seed: int) -> bytes:
    """Return a block of an index: hashes and the blocks of the directory where they begin, after `head`."""
    room = _index_room(len(head))
    data = head + pack("<HHI", room, len(index), index[0][1])
    data += b"".join(pack("<II", first, block) for first, block in index[1:])
    checksum = advance(crc32c(seed, data), 8)
    return data.ljust(BLOCK_SIZE - 8, b"\0") + pack("<II", 0, checksum)
