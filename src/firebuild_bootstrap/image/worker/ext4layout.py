"""Where everything is in an ext4 file system, and the blocks that say so: superblock, descriptors, bitmaps.

block 0                 superblock
1 …                     group descriptors, and room for more, so that resize2fs can let it grow
…                       contents of files, in the order of the entries, and blocks of maps and attributes
…                       directories
…                       bitmaps and inodes of all groups, one after the other (flex_bg)
…                       journal
…                       free space
groups 1, 3^n, 5^n, 7^n begin with copies of superblock and descriptors, and have the same room
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from copy import copy
from struct import pack, pack_into
from typing import Final, NamedTuple

from firebuild_bootstrap.image.worker.ext4hash import CRC_START, crc32c
from firebuild_bootstrap.image.worker.ext4nodes import BLOCK_SIZE, INODE_SIZE

GROUP: Final = 8 * BLOCK_SIZE
"""Blocks of a group: as many as one block has bits."""
ROOT: Final = 2
RESIZE: Final = 7
JOURNAL: Final = 8
FIRST_INODE: Final = 11
"""The inodes before are the file system's own."""

_INODES: Final = BLOCK_SIZE // INODE_SIZE  # in a block
_DESCRIPTORS: Final = BLOCK_SIZE // 64
_GROWTH: Final = 128  # blocks of descriptors for which there is room: 1 TiB
_MOST_GROWTH: Final = 1024  # beyond the descriptors in use: the kernel allows no more
_LEAST_GROUP: Final = 50  # blocks beside superblock and descriptors, as mke2fs has it

# What `mke2fs -t ext4` chooses, so that guests and tools find what they know.
_HAS_JOURNAL: Final = 0x4
_COMPATIBLE: Final = 0x8 | 0x10 | 0x20  # ext_attr, resize_inode, dir_index
_INCOMPATIBLE: Final = 0x2 | 0x40 | 0x80 | 0x200  # filetype, extents, 64bit, flex_bg
# sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum
_READ_ONLY: Final = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400
_INODES_UNUSED: Final = 1  # flags of a group: what was never used need not be read
_BLOCKS_UNUSED: Final = 2
_ZEROED: Final = 4

Stretch = tuple[int, int]
"""Blocks on the disk: the first one, and how many."""


class Space:
    """Gives out blocks from the beginning to the end, but for those of superblocks and descriptors.

    Args:
        size: bytes of the file system, where they are known; else 0.
    """

    def __init__(self, size: int) -> None:
        needed = -(-size // (BLOCK_SIZE * GROUP * _DESCRIPTORS))
        self.prefix = 1 + max(_GROWTH, min(4 * needed, needed + _MOST_GROWTH))
        """Blocks of a superblock, descriptors and room for more."""
        self._members = {0, 1, *(base**power for base in (3, 5, 7) for power in range(1, 21))}
        self._groups = sorted(self._members)
        self.at = 0
        """The next block that is free; all before are used, but for the gaps."""
        self.gaps: list[tuple[int, int]] = []
        """What was passed over: the first block, and the one after it."""
        self._limit = 0
        self._next = 0
        self._skip()

    def backups(self, groups: int) -> list[int]:
        """Return the groups that begin with a superblock."""
        return self._groups[: bisect_right(self._groups, groups - 1)]

    def take(self, count: int) -> list[Stretch]:
        """Return `count` blocks."""
        found = []
        while count:
            some = min(count, self._limit - self.at)
            found.append((self.at, some))
            self.at += some
            count -= some
            self._skip()
        return found

    def whole(self, count: int) -> int:
        """Return the first of `count` blocks in one stretch."""
        while self.at + count > self._limit:
            self.gaps.append((self.at, self._limit))
            self.at = self._limit
            self._skip()
        return self.take(count)[0][0]

    def used_in(self, group: int, blocks: int) -> list[tuple[int, int]]:
        """Return the used blocks of a group, counted from its first: the first one, and the one after it.

        Args:
            group: its number.
            blocks: of the file system.
        """
        first = group * GROUP
        last = min(first + GROUP, blocks)
        if first >= self.at:
            return [(0, self.prefix)] if group in self._members else []
        used = []
        at = first
        for gap, behind in self.gaps:  # they end where a group does
            if first <= gap < last:
                used.append((at - first, gap - first))
                at = behind
        if at < last:
            used.append((at - first, min(self.at, last) - first))
        return used

    def _skip(self) -> None:
        if self.at == self._limit:
            self.at += self.prefix
            self._next += 1
            self._limit = self._groups[self._next] * GROUP


class Plan(NamedTuple):
    """Where everything is.

    Args:
        blocks: of the file system.
        groups: number of them.
        inodes: of a group.
        reserved_map: the block that names those that are kept for descriptors.
        bitmaps: blocks of the bitmaps of blocks, and then of inodes, of all groups.
        tables: first blocks of the inodes of each group.
        journal: its blocks.
        space: what is used.
        free: number of free blocks.
    """

    blocks: int
    groups: int
    inodes: int
    reserved_map: int
    bitmaps: list[int]
    tables: list[int]
    journal: list[Stretch]
    space: Space
    free: int

    @property
    def descriptors(self) -> int:
        """Blocks of group descriptors."""
        return -(-self.groups // _DESCRIPTORS)

    @property
    def reserved(self) -> range:
        """Blocks that are kept for more of them."""
        return range(1 + self.descriptors, self.space.prefix)


class Identity(NamedTuple):
    """What tells a file system from others: `checksum` is where all its checksums begin."""

    uuid: bytes
    hash_seed: bytes
    label: bytes
    checksum: int


def content_uuid(digest: bytes) -> bytes:
    """Return a UUID that begins as a digest does: of version 8, which RFC 9562 leaves to its maker."""
    return bytes([*digest[:6], digest[6] & 0x0F | 0x80, digest[7], digest[8] & 0x3F | 0x80, *digest[9:16]])


class TooManyGroupsError(Exception):
    """There is no room for the descriptors of all groups."""


def place(space: Space, blocks: int, inodes: int, *, journal: bool) -> Plan | None:
    """Find a place for everything but contents and directories; None where there is none.

    Args:
        space: has given out those. It is left as it is.
        blocks: of the file system.
        inodes: how many it has, at least.
        journal: whether it has one.

    Raises:
        TooManyGroupsError: it gets larger than `space` was made for.
    """
    space = copy(space)
    space.gaps = []
    groups = -(-blocks // GROUP)
    if -(-groups // _DESCRIPTORS) >= space.prefix:
        raise TooManyGroupsError
    if groups > 1 and 0 < blocks % GROUP < space.prefix + _LEAST_GROUP:
        # Such a group is of no use: it has hardly room for its own superblock.
        groups -= 1
        blocks = groups * GROUP
    in_group = -(-inodes // (groups * _INODES)) * _INODES
    if in_group > GROUP:
        return None
    reserved_map = space.take(1)[0][0]
    bitmaps = [block for start, count in space.take(2 * groups) for block in range(start, start + count)]
    tables = [space.whole(in_group // _INODES) for _ in range(groups)]
    stretches = space.take(_journal_blocks(blocks)) if journal else []
    free = blocks - space.at + sum(behind - first for first, behind in space.gaps)
    free -= space.prefix * sum(group * GROUP >= space.at for group in space.backups(groups))
    if space.at > blocks or free < 0:
        return None
    return Plan(blocks, groups, in_group, reserved_map, bitmaps, tables, stretches, space, free)


def _journal_blocks(blocks: int) -> int:
    """Return how large a journal is in a file system of so many blocks: as mke2fs has it, up to 128 MiB.

    So it is in three places at most, and four fit into its inode.
    """
    sizes = ((2048, 0), (32768, 1024), (1 << 18, 4096), (1 << 19, 8192), (1 << 22, 16384))
    return next((size for limit, size in sizes if blocks < limit), 32768)


def journal_superblock(blocks: int, uuid: bytes) -> bytes:
    """Return the begin of an empty journal (kernel documentation, "Journal (jbd2)"): big-endian."""
    head = pack(">9I", 0xC03B3998, 4, 0, BLOCK_SIZE, blocks, 1, 1, 0, 0)
    return (head.ljust(0x30, b"\0") + uuid + pack(">I", 1)).ljust(1024, b"\0")


def reserved_blocks(plan: Plan) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the blocks of the resize inode.

    Each block that is kept for descriptors lists its copies, and one block lists those. As the old maps of
    blocks are made that have two levels, the resize inode looks like a file.
    """
    backups = plan.space.backups(plan.groups)[1:]
    table = bytearray(BLOCK_SIZE)
    for block in plan.reserved:
        # Where it is listed depends on its number, modulo what fits into a block.
        pack_into("<I", table, (block - 1) * 4 % BLOCK_SIZE, block)
        yield block, pack(f"<{len(backups)}I", *(block + group * GROUP for group in backups))
    yield plan.reserved_map, bytes(table)


def group_blocks(
    plan: Plan, identity: Identity, used: int, folders: Iterable[int], journal: bytes
) -> Iterator[tuple[int, bytes]]:
    """Yield bitmaps, descriptors and superblocks, with the blocks where they begin.

    Args:
        plan: where everything is.
        identity: of the file system.
        used: number of inodes in use, all at the begin.
        folders: inodes of directories.
        journal: its inode.
    """
    in_group = [0] * plan.groups
    for number in folders:
        in_group[(number - 1) // plan.inodes] += 1
    table = bytearray()
    for group in range(plan.groups):
        blocks = min(GROUP, plan.blocks - group * GROUP)
        inodes = min(max(0, used - group * plan.inodes), plan.inodes)
        stretches = plan.space.used_in(group, plan.blocks)
        flags, sums = _ZEROED, [0, 0]
        # Of the last group, which may be short, readers want a bitmap.
        if 0 < group < plan.groups - 1 and group * GROUP >= plan.space.at:
            flags |= _BLOCKS_UNUSED
        else:
            data = _bitmap([*stretches, (blocks, GROUP)])
            sums[0] = crc32c(identity.checksum, data)
            yield plan.bitmaps[group], data
        if inodes:
            data = _bitmap([(0, inodes), (plan.inodes, GROUP)])
            sums[1] = crc32c(identity.checksum, data[: plan.inodes // 8])
            yield plan.bitmaps[plan.groups + group], data
        else:
            flags |= _INODES_UNUSED
        free = blocks - sum(behind - first for first, behind in stretches)
        places = (plan.bitmaps[group], plan.bitmaps[plan.groups + group], plan.tables[group])
        counts = (free, plan.inodes - inodes, in_group[group], flags)
        descriptor = bytearray(_descriptor(places, counts, sums))
        checksum = crc32c(identity.checksum, pack("<I", group) + descriptor)
        pack_into("<H", descriptor, 0x1E, checksum & 0xFFFF)
        table += descriptor
    for group in plan.space.backups(plan.groups):
        superblock = _superblock(plan, identity, group, plan.groups * plan.inodes - used, journal)
        yield group * GROUP, superblock if group else bytes(1024) + superblock
        yield group * GROUP + 1, bytes(table)


def _bitmap(stretches: Iterable[tuple[int, int]]) -> bytes:
    """Return a block with ones in `stretches`: the first place, and the one after it."""
    bits = 0
    for first, behind in stretches:
        bits |= (1 << behind) - (1 << first)
    return bits.to_bytes(BLOCK_SIZE, "little")


def _descriptor(places: tuple[int, int, int], counts: tuple[int, int, int, int], sums: list[int]) -> bytes:
    low = [each & 0xFFFFFFFF for each in places]
    high = [each >> 32 for each in places]
    unused = counts[1]  # inodes at the end of the table, which are all that are free
    first = pack("<3I4HI4H", *low, *counts, 0, sums[0] & 0xFFFF, sums[1] & 0xFFFF, unused, 0)
    return first + pack("<3I4HI2HI", *high, 0, 0, 0, 0, 0, sums[0] >> 16, sums[1] >> 16, 0)


def _superblock(plan: Plan, identity: Identity, group: int, free_inodes: int, journal: bytes) -> bytes:
    data = bytearray(1024)
    low, high = plan.blocks & 0xFFFFFFFF, plan.blocks >> 32
    pack_into("<4I", data, 0x0, plan.groups * plan.inodes, low, 0, plan.free & 0xFFFFFFFF)
    pack_into("<7I", data, 0x10, free_inodes, 0, 2, 2, GROUP, GROUP, plan.inodes)
    # Clean, to be mounted any number of times; the errors that a kernel finds do not stop it.
    pack_into("<2I6H", data, 0x2C, 0, 0, 0, 0xFFFF, 0xEF53, 1, 1, 0)
    pack_into("<4I2H", data, 0x40, 0, 0, 0, 1, 0, 0)
    pack_into("<I2H", data, 0x54, FIRST_INODE, INODE_SIZE, group)
    compatible = _COMPATIBLE | (_HAS_JOURNAL if plan.journal else 0)
    pack_into("<3I", data, 0x5C, compatible, _INCOMPATIBLE, _READ_ONLY)
    pack_into("<16s16s", data, 0x68, identity.uuid, identity.label)
    pack_into("<H", data, 0xCE, len(plan.reserved))
    if plan.journal:
        pack_into("<I", data, 0xE0, JOURNAL)
        # A copy of what finds the journal: its map and size.
        data[0x10C:0x150] = journal[0x28:0x64] + journal[0x6C:0x70] + journal[0x4:0x8]
    # Half-MD4; options that are mounted with: user_xattr, acl.
    pack_into("<16s2BHI", data, 0xEC, identity.hash_seed, 1, 1 if plan.journal else 0, 64, 0xC)
    # The last: in hashes, characters have no sign.
    pack_into("<3I2HI", data, 0x150, high, 0, plan.free >> 32, 32, 32, 2)
    pack_into("<2B", data, 0x174, 4, 1)  # groups that share their metadata, as a power of 2; CRC-32C
    pack_into("<I", data, 0x3FC, crc32c(CRC_START, data[:0x3FC]))
    return bytes(data)
