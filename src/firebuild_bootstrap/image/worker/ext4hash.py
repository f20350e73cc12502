"""CRC-32C and half-MD4, which ext4 wants of all metadata and of names in large directories.

The standard library has neither. One by one Python takes 14 microseconds for an inode and as many for a name.
So they are worked on by the thousand: what is at one place in each of them is one operation on a long string
or a long number. That takes 2 microseconds for an inode and less for a name, so images have the checksums
(metadata_csum) that those of mke2fs have.

CRCs are states here, as ext4 keeps them: they begin as all ones, or go on from another, and are not inverted
at the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from sys import byteorder
from typing import Final

CRC_START: Final = 0xFFFFFFFF
_POLYNOMIAL: Final = 0x82F63B78  # reflected (RFC 3720, appendix B.4, has test vectors)

Operator = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
"""What some zero bytes make of a state: it is linear, so each of its four bytes has a table."""


@cache
def _table() -> Sequence[int]:
    return _combined([_one_byte(1 << bit) for bit in range(8)])


def _one_byte(state: int) -> int:
    for _ in range(8):
        state = state >> 1 ^ (_POLYNOMIAL if state & 1 else 0)
    return state


def _combined(columns: Sequence[int]) -> Sequence[int]:
    """Return the table of a linear function of eight bits from what it makes of each."""
    table = [0]
    for column in columns:
        table += [value ^ column for value in table]
    return table


@cache
def _zeros(power: int) -> Operator:
    """Return the operator of 2**power zero bytes."""

    def once(state: int) -> int:
        return advance(state, 1 << power - 1) if power else table[state & 255] ^ state >> 8

    table = _table()
    columns = [once(once(1 << bit)) if power else once(1 << bit) for bit in range(32)]
    return (
        _combined(columns[:8]),
        _combined(columns[8:16]),
        _combined(columns[16:24]),
        _combined(columns[24:]),
    )


def advance(state: int, count: int) -> int:
    """Return the state after `count` zero bytes."""
    power = 0
    while count:
        if count & 1:
            low, second, third, high = _zeros(power)
            state = low[state & 255] ^ second[state >> 8 & 255] ^ third[state >> 16 & 255] ^ high[state >> 24]
        count >>= 1
        power += 1
    return state


def crc32c(state: int, data: bytes | bytearray) -> int:
    """Return the state after `data`; zeros at its end cost nothing."""
    table = _table()
    used = data.rstrip(b"\0")
    for byte in used:
        state = table[(state ^ byte) & 255] ^ state >> 8
    return advance(state, len(data) - len(used))


@cache
def _planes(power: int) -> Sequence[Sequence[bytes]]:
    """Return `_zeros` as tables for `bytes.translate`: one for each byte of the result and of the state."""
    return [
        [bytes(value >> shift & 255 for value in table) for table in _zeros(power)]
        for shift in (0, 8, 16, 24)
    ]


def crc32c_each(state: int, fields: Iterable[tuple[bytes | bytearray, int]], count: int) -> Sequence[bytes]:
    """Return the states after each of `count` records: the lowest bytes of all of them, the next ones, …

    Args:
        state: with which each begins.
        fields: the records in one or more parts: those of all records one after the other, and the length
            of one in bytes.
        count: number of the records.
    """
    nothing = bytes(count)
    # Plane n has byte n of all states.
    planes = [int.from_bytes(bytes([state >> shift & 255]) * count, "little") for shift in (0, 8, 16, 24)]
    single = [tables[0] for tables in _planes(0)]
    waiting = 0  # zeros that all records have at this place
    for records, length in fields:
        for place in range(length):
            column = records[place::length]
            if column == nothing:
                waiting += 1
                continue
            planes = _advanced(planes, waiting, count)
            waiting = 0
            index = (planes[0] ^ int.from_bytes(column, "little")).to_bytes(count, "little")
            low, second, third, high = (int.from_bytes(index.translate(table), "little") for table in single)
            planes = [low ^ planes[1], second ^ planes[2], third ^ planes[3], high]
    return [plane.to_bytes(count, "little") for plane in _advanced(planes, waiting, count)]


def _advanced(planes: list[int], zeros: int, count: int) -> list[int]:
    power = 0
    while zeros:
        if zeros & 1:
            old = [plane.to_bytes(count, "little") for plane in planes]
            planes = []
            for tables in _planes(power):
                plane = 0
                for table, each in zip(tables, old, strict=True):
                    plane ^= int.from_bytes(each.translate(table), "little")
                planes.append(plane)
        zeros >>= 1
        power += 1
    return planes


_CHUNK: Final = 32
# The rounds of half_md4_transform in the kernel's fs/ext4/hash.c: which word each step takes, and how far it
# rotates what comes out; then what is added to it.
_ROUNDS: Final = (
    ((0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19), 0),
    ((1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13), 0x5A827999),
    ((3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15), 0x6ED9EBA1),
)
_LAST_HASH: Final = 0xFFFFFFFE  # means the end of a directory


def half_md4(names: Sequence[bytes], seed: bytes) -> list[tuple[int, int]]:
    """Return the hashes of names in a directory, major and minor, for characters without sign.

    Args:
        names: up to some thousands of names of up to 255 bytes.
        seed: the 16 bytes of the file system, not all of them zero.
    """
    found: list[tuple[int, int]] = [(0, 0)] * len(names)
    by_length: dict[int, list[int]] = {}
    for number, name in enumerate(names):
        by_length.setdefault((len(name) + _CHUNK - 1) // _CHUNK, []).append(number)
    for chunks, numbers in by_length.items():
        states = [
            _lanes([int.from_bytes(seed[at : at + 4], "little")] * len(numbers)) for at in (0, 4, 8, 12)
        ]
        mask = _lanes([0xFFFFFFFF] * len(numbers))
        for chunk in range(chunks):
            text = b"".join(_padded(names[number][chunk * _CHUNK :]) for number in numbers)
            words = array("I", text)
            if byteorder == "little":
                words.byteswap()
            states = _transform(states, [_lanes(words[place::8]) for place in range(8)], mask)
        majors, minors = (_values(states[place], len(numbers)) for place in (1, 2))
        for number, major, minor in zip(numbers, majors, minors, strict=True):
            major &= ~1  # noqa: PLW2901 - the lowest bit tells of collisions
            found[number] = (major if major != _LAST_HASH else _LAST_HASH - 2, minor)
    return found


def _padded(rest: bytes) -> bytes:
    """Return the next 32 bytes that are hashed, as eight big-endian words: str2hashbuf in the kernel."""
    pad = bytes([len(rest)])
    rest = rest[:_CHUNK]
    whole = len(rest) & ~3
    if whole < len(rest):
        rest = rest[:whole] + pad * (4 - len(rest) + whole) + rest[whole:]
    return rest.ljust(_CHUNK, pad)


def _lanes(values: Sequence[int]) -> int:
    """Return one number with a value in each 64 bits of it: sums of two have room there."""
    return int.from_bytes(array("Q", values).tobytes(), byteorder)


def _values(lanes: int, count: int) -> array[int]:
    return array("Q", lanes.to_bytes(8 * count, byteorder))


def _transform(states: Sequence[int], words: Sequence[int], mask: int) -> list[int]:
    a, b, c, d = states
    each = mask // 0xFFFFFFFF
    for number, (order, rotations, constant) in enumerate(_ROUNDS):
        added = constant * each
        for step, place in enumerate(order):
            if number == 0:
                mixed = d ^ b & (c ^ d)
            elif number == 1:
                mixed = (b & c) + ((b ^ c) & d)
            else:
                mixed = b ^ c ^ d
            a = a + mixed + words[place] + added & mask
            a <<= rotations[step % 4]
            # What was rotated out is above the lane's lower half.
            a, b, c, d = d, (a & mask) | (a >> 32 & mask), b, c
    return [(old + new) & mask for old, new in zip(states, (a, b, c, d), strict=True)]
