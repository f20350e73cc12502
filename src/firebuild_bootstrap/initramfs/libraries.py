"""Which shared libraries programs need, and where they are: what the loader would find (ld.so(8))."""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_pki.values import dataclass

_MAGIC: Final = b"\x7fELF"
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM: Final = struct.Struct("<IIQQQQQQ")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_64_BIT, _LITTLE_ENDIAN = 2, 1
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_MACHINES: Final = {62: "x86_64", 183: "aarch64"}


_DEFAULT: Final = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")
# Loaded by the C library itself, when threads end or names are looked up; older ones need the files.
_BY_NAME: Final = ("libgcc_s.so.1", "libnss_files.so.2", "libnss_dns.so.2")


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
        ElfError: it is not a 64-bit little-endian ELF file, or is damaged.
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
        ElfError: it is not an ELF file, or has no such section.
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
    raise ElfError("it is not a kernel module")


def _header(data: bytes) -> tuple[int, ...]:
    if data[:4] != _MAGIC or len(data) < _HEADER.size:
        raise ElfError("it is not an ELF file")
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


@dataclass(frozen=True)
class Libraries:
    """The loader's path as programs name it, and all libraries by the name they are asked for."""

    loader: str
    files: Mapping[str, Path]


class LibraryFinder:
    """Finds libraries as the loader of this machine would.

    Args:
        machine: the architecture, as `os.uname` names it.
        environ: may hold LD_LIBRARY_PATH.
        configuration: the loader's list of directories.
    """

    def __init__(
        self, machine: str, environ: Mapping[str, str], configuration: Path = Path("/etc/ld.so.conf")
    ) -> None:
        self._machine = machine
        self._first = [entry for entry in environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
        multiarch = [f"{folder}/{machine}-linux-gnu" for folder in ("/lib", "/usr/lib")]
        self._last = [*_configured(configuration), *multiarch, *_DEFAULT]

    def closure(self, program: Path, others: Iterable[Path]) -> Libraries:
        """Return everything that a program and the extension modules it loads need.

        Raises:
            MachineError: a library is missing, or the program is static.
        """
        main = self._read(program)
        if not main.interpreter:
            raise MachineError(
                f"the Python that runs firebuild ({program}) is statically linked and can't load extension "
                "modules in a machine",
                hint="run firebuild with a Python that is linked dynamically, such as a distribution's",
            )
        loader = Path(main.interpreter)
        found = {loader.name: loader}
        home = self._folders(program, main)
        todo = [program, *others]
        while todo:
            asker = todo.pop()
            elf = self._read(asker)
            for name in elf.needed:
                if name not in found:
                    found[name] = self._find(name, asker, [*self._folders(asker, elf), *home])
                    todo.append(found[name])
        # Only from where the C library is: another one's would not fit.
        libc = next((path.parent for name, path in found.items() if name.startswith("libc.")), loader.parent)
        for name in _BY_NAME:
            if name not in found and (libc / name).exists():
                found[name] = libc / name
        return Libraries(main.interpreter, found)

    def _find(self, name: str, asker: Path, folders: Iterable[str]) -> Path:
        for folder in [*folders, *self._first, *self._last]:
            candidate = Path(folder, name)
            if candidate.is_file() and self._fits(candidate):
                return candidate
        raise MachineError(
            f"{asker} needs the library {name}, which was not found on this machine",
            hint="install it, or name its directory in LD_LIBRARY_PATH",
        )

    def _fits(self, path: Path) -> bool:
        try:
            return read_elf(path.read_bytes()).machine == self._machine
        except (ElfError, OSError):
            return False  # such as a linker script, or another architecture's

    def _read(self, path: Path) -> Elf:
        try:
            return read_elf(path.read_bytes())
        except OSError as error:
            raise MachineError(f"{path} can't be read: {error.strerror}") from error
        except ElfError as error:
            raise MachineError(
                f"{path} can't be put into the initramfs: {error}",
                hint="run firebuild with a Python program, not through a wrapper script",
            ) from error

    @staticmethod
    def _folders(path: Path, elf: Elf) -> list[str]:
        origin = str(path.resolve().parent)
        return [entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for entry in elf.search]


def _configured(file: Path, seen: set[str] | None = None) -> Iterator[str]:
    """Yield the directories that ld.so.conf(5) and what it includes name; each file counts once."""
    seen = set() if seen is None else seen
    if (name := os.path.realpath(file)) in seen:
        return
    seen.add(name)
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if words[:1] == ["include"]:
            for pattern in words[1:]:
                for name in sorted(glob.glob(str(file.parent / pattern))):
                    yield from _configured(Path(name), seen)
        elif words:
            yield words[0]
