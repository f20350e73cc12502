"""Small ELF files for tests: a program or library with what it needs, and a kernel module."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def make_elf(
    *,
    needed: Sequence[str] = (),
    runpath: str = "",
    rpath: str = "",
    interpreter: str = "",
    machine: int = 62,
) -> bytes:
    """A 64-bit file whose single segment is the whole file, loaded at 0x400000."""
    start, programs = 0x400000, 3 if interpreter else 2
    strings = bytearray(b"\0")

    def put(text: str) -> int:
        place = len(strings)
        strings.extend(text.encode() + b"\0")
        return place

    tags = [(1, put(name)) for name in needed]
    tags += [(tag, put(text)) for tag, text in ((29, runpath), (15, rpath)) if text]
    body = 64 + programs * 56
    loader = interpreter.encode() + b"\0" if interpreter else b""
    dynamic_place = body + len(loader)
    strings_place = dynamic_place + (len(tags) + 2) * 16
    tags += [(5, start + strings_place), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *tag) for tag in tags)
    total = strings_place + len(strings)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, 64, 0, 0, 64, 56, programs, 64, 0, 0
    )
    segments = [(1, 0, total, start), (2, dynamic_place, len(dynamic), start + dynamic_place)]
    if interpreter:
        segments.append((3, body, len(loader), start + body))
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, 4, place, address, address, size, size, 8)
        for kind, place, size, address in segments
    )
    return header + table + loader + dynamic + bytes(strings)


def make_module(release: str = "6.1.0-test", **facts: str | Sequence[str]) -> bytes:
    """A kernel module with `.modinfo` and nothing else."""
    pairs = [("vermagic", f"{release} SMP mod_unload")]
    for name, values in facts.items():
        pairs += [(name, value) for value in ([values] if isinstance(values, str) else values)]
    info = b"".join(f"{name}={value}".encode() + b"\0" for name, value in pairs)
    names = b"\0.modinfo\0.shstrtab\0"
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, 64 + len(info) + len(names), 0, 64, 0, 0, 64, 3, 2),
    )
    sections = [(0, 0, 0, 0), (1, 1, 64, len(info)), (10, 3, 64 + len(info), len(names))]
    table = b"".join(
        struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, place, size, 0, 0, 1, 0)
        for name, kind, place, size in sections
    )
    return header + info + names + table
