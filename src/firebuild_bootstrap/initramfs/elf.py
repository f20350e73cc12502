"""Reads of ELF files what an initramfs needs to know: libraries, loader, modules' facts (elf(5))."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_MAGIC: Final = b"\x7fELF"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_64_BIT, _LITTLE_ENDIAN = 2, 1
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}


class ElfError(Exception):
    """A file is not an ELF file that can be read here; the text says why."""


@dataclass(frozen=True)
class Elf:
    """What a program or a library says about itself.

    Args:
        machine: as `os.uname` names it; empty for others than those supported.
        interpreter: path of the loader; empty for libraries and static programs.
        needed: names of the libraries that it needs.
        search: directories to look for them in, `$ORIGIN` is its own.
    """

    machine: str
    interpreter: str
    needed: tuple[str, ...]
    search: tuple[str, ...]


def read_elf(data: bytes) -> Elf:
    """Read the headers and the dynamic section.

    Raises:
        ElfError: it is no 64-bit little-endian ELF file, or a broken one.
    """
    header = _header(data)
    try:
        programs = [
            _PROGRAM.unpack_from(data, header[5] + number * header[9]) for number in range(header[10])
        ]
        interpreter = next((_segment(data, item) for item in programs if item[0] == _PT_INTERP), b"")
        dynamic = next((_segment(data, item) for item in programs if item[0] == _PT_DYNAMIC), b"")
        tags = list(_DYNAMIC.iter_unpack(dynamic[: len(dynamic) // _DYNAMIC.size * _DYNAMIC.size]))
        needed = tuple(_strings(data, programs, tags, _DT_NEEDED))
        # The loader ignores RPATH where there is a RUNPATH (ld.so(8)).
        paths = [*_strings(data, programs, tags, _DT_RUNPATH)] or [*_strings(data, programs, tags, _DT_RPATH)]
    except (struct.error, ValueError, IndexError) as error:
        raise ElfError("it is a broken ELF file") from error
    search = tuple(part for path in paths for part in path.split(":") if part)
    return Elf(_MACHINES.get(header[2], ""), interpreter.rstrip(b"\0").decode(), needed, search)


def read_modinfo(data: bytes) -> dict[str, list[str]]:
    """Return the section `.modinfo` of a kernel module: each name with all of its values.

    Raises:
        ElfError: it is no ELF file, or has no such section.
    """
    header = _header(data)
    try:
        sections = [
            _SECTION.unpack_from(data, header[6] + number * header[11]) for number in range(header[12])
        ]
        names = sections[header[13]]
        for section in sections:
            if _text(data, names[4] + section[0]) == ".modinfo":
                return _pairs(data[section[4] : section[4] + section[5]])
    except (struct.error, ValueError, IndexError) as error:
        raise ElfError("it is a broken ELF file") from error
    raise ElfError("it is no kernel module")


def _header(data: bytes) -> tuple[int, ...]:
    if data[:4] != _MAGIC or len(data) < _HEADER.size:
        raise ElfError("it is no ELF file")
    if (data[4], data[5]) != (_64_BIT, _LITTLE_ENDIAN):
        raise ElfError("it is not for a 64-bit little-endian machine")
    return _HEADER.unpack_from(data)


def _segment(data: bytes, program: tuple[int, ...]) -> bytes:
    return data[program[2] : program[2] + program[5]]


def _strings(
    data: bytes, programs: list[tuple[int, ...]], tags: list[tuple[int, ...]], wanted: int
) -> Iterator[str]:
    table = next((value for tag, value in tags if tag == _DT_STRTAB), 0)
    for tag, value in tags:
        if tag == wanted:
            yield _text(data, _offset(programs, table) + value)


def _offset(programs: list[tuple[int, ...]], address: int) -> int:
    for kind, _flags, offset, start, _physical, size, *_ in programs:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise ValueError("an address outside of the file")


def _text(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()


def _pairs(section: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in section.split(b"\0"):
        name, equals, value = item.decode("utf-8", "replace").partition("=")
        if equals:
            found.setdefault(name, []).append(value)
    return found
