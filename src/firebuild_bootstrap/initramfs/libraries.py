"""Which shared libraries programs need, and where they are: what the loader would find (ld.so(8))."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.initramfs.elf import Elf, ElfError, read_elf

_DEFAULT: Final = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")
# Loaded by the C library itself, when threads end or names are looked up; older ones need the files.
_BY_NAME: Final = ("libgcc_s.so.1", "libnss_files.so.2", "libnss_dns.so.2")


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
                hint="run firebuild with a Python program, not through a script that stands for one",
            ) from error

    @staticmethod
    def _folders(path: Path, elf: Elf) -> list[str]:
        origin = str(path.resolve().parent)
        return [entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for entry in elf.search]


def _configured(file: Path) -> Iterator[str]:
    try:
        lines = file.read_text("utf-8", "replace").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if words[:1] == ["include"]:
            for pattern in words[1:]:
                for name in sorted(glob.glob(str(file.parent / pattern))):
                    yield from _configured(Path(name))
        elif words:
            yield words[0]
