"""The initramfs: a small root file system whose init runs vminit.

It is made once for the same inputs, in a form that Linux unpacks, and kept in the store.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

import deflate
import zstandard

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.content_store import ROOM
from firebuild_bootstrap.initramfs import cpio
from firebuild_bootstrap.initramfs.cpio import write_archive
from firebuild_bootstrap.initramfs.libraries import LibraryFinder
from firebuild_bootstrap.initramfs.modules import ModuleSet, read_modules
from firebuild_bootstrap.initramfs.runtime import PythonRuntime, compile_sources, find_python
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_pki.homes import open_file
from firebuild_pki.values import dataclass

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
        with open_file(path) as file:
            return file.read()
    except OSError as error:
        raise MachineError(f"{path} can't be read: {error.strerror}") from error


# --- the file -------------------------------------------------------------------------------------

# The highest levels save one part in a hundred, for two to four times the time.
_ZSTD_LEVEL: Final = 9
_GZIP_LEVEL: Final = 6  # of libdeflate: smaller than zlib's highest, in a tenth of the time
_LZ4: Final = ("-l", "-9", "-z", "-c")  # Linux knows the legacy format only


_MOST_BYTES: Final = 1 << 30  # of a kernel, which is more of it by far
_KEPT_SECONDS: Final = 30 * 24 * 3600


class Compression(StrEnum):
    """How an initramfs is compressed; every kernel can read gzip, and one that is not compressed."""

    ZSTD = "zstd"
    LZ4 = "lz4"
    GZIP = "gzip"
    NONE = "none"

    @property
    def suffix(self) -> str:
        """What the names of such files usually end in."""
        return {"zstd": ".zst", "lz4": ".lz4", "gzip": ".gz", "none": ""}[self.value]

    @property
    def recipe(self) -> str:
        """What decides the bytes besides the content: the program that compresses, and how."""
        match self:
            case Compression.ZSTD:
                return f"zstd {zstandard.backend} {zstandard.ZSTD_VERSION} {_ZSTD_LEVEL}"
            case Compression.LZ4:
                return f"lz4 {_lz4_version()} {_LZ4}"
            case Compression.GZIP:
                return f"gzip libdeflate {deflate.__version__} {_GZIP_LEVEL}"
            case Compression.NONE:
                return "none"


def compress(data: bytes, how: Compression) -> bytes:
    """Compress `data`.

    Raises:
        MachineError: the program for it failed.
        InputError: the program for it is not installed.
    """
    match how:
        case Compression.ZSTD:
            return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(data)
        case Compression.LZ4:
            return run_lz4(*_LZ4, data=data, hint="install the package lz4, or choose --compress zstd")
        case Compression.GZIP:
            return bytes(deflate.gzip_compress(data, compresslevel=_GZIP_LEVEL))
        case Compression.NONE:
            return data


def _lz4_version() -> str:
    return run_lz4("--version").decode("utf-8", "replace").strip()


def run_lz4(*arguments: str, data: bytes = b"", hint: str = "install the package lz4") -> bytes:
    """Return what the program lz4 makes of `data`.

    Raises:
        InputError: it is not installed.
        MachineError: it failed.
    """
    program = shutil.which("lz4")
    if program is None:
        raise InputError("the program lz4 was not found", hint=hint)
    try:
        done = run_program([program, *arguments], data=data, most=_MOST_BYTES, install=hint)
    except LimitExceeded as error:
        raise MachineError(f"lz4 failed: {error}") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip() or f"status {done.returncode}"
        raise MachineError(f"lz4 failed: {words}")
    return done.stdout


def initramfs_image(
    store: Path,
    *,
    compression: Compression = Compression.ZSTD,
    kernel_modules: Sequence[Path] = (),
    runtime: PythonRuntime | None = None,
) -> Path:
    """Return the initramfs, which is made if the store has none of the same inputs.

    Args:
        store: the directory of bases and images (`Home.root`); initramfs images are in `initramfs` below it.
        compression: has to be one that the kernel can read.
        kernel_modules: directories of modules (`/lib/modules/RELEASE`), one for each kernel to boot; none
            for kernels that have the virtio drivers and the file system built in.
        runtime: the Python to put in; this process's own when None.

    Raises:
        InputError: a directory holds no usable modules.
        MachineError: this Python can't be put into a machine, or the store can't be written.
    """
    modules = [read_modules(directory) for directory in kernel_modules]
    releases = [found.release for found in modules]
    if len(set(releases)) < len(releases):
        raise InputError(
            f"two directories hold modules of the same kernel: {', '.join(sorted(releases))}",
            hint="name one of them",
        )
    contents = collect(runtime or find_python(), modules, environ=os.environ)
    folder = store / "initramfs"
    path = folder / f"{contents.digest(compression.recipe)[:32]}.cpio{compression.suffix}"
    try:
        if not path.exists():
            archive = io.BytesIO()
            write_archive(contents.realise(), archive)
            _publish(path, compress(archive.getvalue(), compression))
        os.utime(path)
        _sweep(folder)
    except OSError as error:
        raise MachineError(
            f"{error.filename or folder}: the initramfs can't be stored: {error.strerror}",
            hint=ROOM,
        ) from error
    return path


def _publish(path: Path, data: bytes) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what was not used for long: other versions, other kernels, leftovers of a crash."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
