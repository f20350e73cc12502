"""What is in the initramfs: a small root file system whose init runs vminit."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.initramfs import cpio
from firebuild_bootstrap.initramfs.libraries import LibraryFinder
from firebuild_bootstrap.initramfs.modules import ModuleSet
from firebuild_bootstrap.initramfs.runtime import PythonRuntime, compile_sources

MACHINES: Final = ("x86_64", "aarch64")
_LAYOUT: Final = 1  # raised when the same inputs give another archive
_PREFIX: Final = "vminit"
_PROGRAM: Final = f"{_PREFIX}/bin/python3"
_INIT: Final = f"""\
#!/{_PROGRAM} -IBSXutf8
from firebuild_bootstrap.guest.init import main
main()
"""
_HOSTS: Final = "127.0.0.1 localhost\n::1 localhost\n"
_FOLDERS: Final = ("dev", "image", "proc", "root", "run", "sys", "tmp")


@dataclass(frozen=True)
class InitramfsContents:
    """All inputs of one initramfs.

    Args:
        runtime: the interpreter that compiles `sources`, and where its library is.
        entries: what goes in as it is.
        sources: Python source code by its path below the library.
    """

    runtime: PythonRuntime
    entries: tuple[cpio.Entry, ...]
    sources: Mapping[str, bytes]

    def digest(self, recipe: str) -> str:
        """Return a digest of everything that decides the bytes of the finished file.

        Args:
            recipe: how the archive is compressed.
        """
        total = hashlib.sha256(f"{_LAYOUT} {recipe} {self.runtime.library}\n".encode())
        for entry in sorted(self.entries, key=lambda entry: entry.path):
            content = hashlib.sha256(entry.data).hexdigest()
            total.update(f"{entry.path} {entry.mode:o} {entry.device} {content}\n".encode())
        for path in sorted(self.sources):
            total.update(f"{path} {hashlib.sha256(self.sources[path]).hexdigest()}\n".encode())
        return total.hexdigest()

    def realise(self) -> list[cpio.Entry]:
        """Compile the sources and return all entries of the archive.

        Raises:
            MachineError: the interpreter failed.
        """
        library = f"{_PREFIX}/{self.runtime.library}"
        compiled = compile_sources(self.runtime.program, self.sources, f"/{library}")
        files = (
            cpio.file(f"{library}/{path.removesuffix('.py')}.pyc", data) for path, data in compiled.items()
        )
        return [*self.entries, *files]


def collect(
    runtime: PythonRuntime,
    modules: Sequence[ModuleSet] = (),
    *,
    environ: Mapping[str, str],
    machine: str | None = None,
) -> InitramfsContents:
    """Read everything that goes into an initramfs.

    Args:
        runtime: the Python to put in.
        modules: kernel modules, one set for each kernel.
        environ: may hold LD_LIBRARY_PATH.
        machine: the architecture; this host's when None.

    Raises:
        MachineError: a file is missing or can't be read, or the architecture is not supported.
    """
    machine = machine or os.uname().machine
    if machine not in MACHINES:
        raise MachineError(
            f"an initramfs can't be built on {machine}: supported are {' and '.join(MACHINES)}",
            hint="build it on the architecture of the machines",
        )
    entries = [
        *(cpio.directory(name) for name in _FOLDERS),
        cpio.character_device("dev/console", 0o600, 5, 1),
        cpio.character_device("dev/null", 0o666, 1, 3),
        cpio.file("init", _INIT.encode(), 0o755),
        cpio.file("etc/hosts", _HOSTS.encode()),
        cpio.file(_PROGRAM, _read(runtime.program), 0o755),
        # The interpreter looks for this directory, even where it is empty.
        cpio.directory(f"{_PREFIX}/{runtime.library}/lib-dynload"),
        *_libraries(runtime, LibraryFinder(machine, environ)),
        *_modules(modules),
    ]
    sources = {}
    for file in runtime.files:
        if file.is_python:
            sources[file.target] = _read(file.source)
        else:
            path = f"{_PREFIX}/{runtime.library}/{file.target}"
            entries.append(cpio.file(path, _read(file.source), 0o755))
    return InitramfsContents(runtime, tuple(entries), sources)


def _libraries(runtime: PythonRuntime, finder: LibraryFinder) -> Iterator[cpio.Entry]:
    """Put all libraries into /lib; wherever a loader looks first, it is led there."""
    libraries = finder.closure(runtime.program, runtime.extensions)
    for name, path in libraries.files.items():
        yield cpio.file(f"lib/{name}", _read(path), 0o755)
    yield cpio.link("lib64", "lib")
    yield cpio.link("usr", ".")
    for machine in MACHINES:
        yield cpio.link(f"lib/{machine}-linux-gnu", ".")
    home = posixpath.normpath(posixpath.dirname(libraries.loader)).strip("/")
    if home not in ("lib", "lib64", "usr/lib", "usr/lib64"):
        yield cpio.link(home, "/lib")


def _modules(sets: Sequence[ModuleSet]) -> Iterator[cpio.Entry]:
    for found in sets:
        folder = f"{_PREFIX}/modules/{found.release}"
        yield cpio.file(f"{folder}/order", "".join(f"{name}\n" for name in found.files).encode())
        yield from (cpio.file(f"{folder}/{name}", data) for name, data in found.files.items())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MachineError(f"{path} can't be read: {error.strerror}") from error
