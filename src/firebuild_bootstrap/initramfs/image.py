"""The finished initramfs, compressed in a form that Linux unpacks, made once for the same inputs and kept."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

import zstandard

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs.contents import collect
from firebuild_bootstrap.initramfs.cpio import write_archive
from firebuild_bootstrap.initramfs.modules import read_modules
from firebuild_bootstrap.initramfs.runtime import PythonRuntime, find_python

_ZSTD_LEVEL: Final = 12
_LZ4: Final = ("-l", "-12", "-z", "-c")  # Linux knows the legacy format only


_KEPT_SECONDS: Final = 30 * 24 * 3600


class Compression(StrEnum):
    """How an initramfs is compressed; gzip is what every kernel can read."""

    ZSTD = "zstd"
    LZ4 = "lz4"
    GZIP = "gzip"

    @property
    def suffix(self) -> str:
        """What such files are usually called."""
        return {"zstd": "zst", "lz4": "lz4", "gzip": "gz"}[self.value]

    @property
    def recipe(self) -> str:
        """What decides the bytes besides the content: the program that compresses, and how."""
        match self:
            case Compression.ZSTD:
                return f"zstd {zstandard.backend} {zstandard.ZSTD_VERSION} {_ZSTD_LEVEL}"
            case Compression.LZ4:
                return f"lz4 {_lz4_version()} {_LZ4}"
            case Compression.GZIP:
                return f"gzip {zlib.ZLIB_RUNTIME_VERSION} 9"


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
            return _run_lz4(*_LZ4, data=data)
        case Compression.GZIP:
            return gzip.compress(data, 9, mtime=0)


def _lz4_version() -> str:
    return _run_lz4("--version").decode("utf-8", "replace").strip()


def _run_lz4(*arguments: str, data: bytes = b"") -> bytes:
    program = shutil.which("lz4")
    if program is None:
        raise InputError(
            "the program lz4 was not found", hint="install the package lz4, or choose --compress zstd"
        )
    done = subprocess.run([program, *arguments], input=data, capture_output=True, check=False)
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
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Return the initramfs, which is made if the store has none of the same inputs.

    Args:
        store: the directory of bases and images (`Home.root`); initramfs images are in `initramfs` below it.
        compression: has to be one that the kernel can read.
        kernel_modules: directories of modules (`/lib/modules/RELEASE`), one for each kernel to boot; none
            for kernels that have the virtio drivers and the file system built in.
        runtime: the Python to put in; this process's own when None.
        environ: may hold LD_LIBRARY_PATH.

    Raises:
        InputError: a directory holds no usable modules.
        MachineError: this Python can't be put into a machine, or the store can't be written.
    """
    modules = [read_modules(directory) for directory in kernel_modules]
    releases = [found.release for found in modules]
    if len(set(releases)) < len(releases):
        raise InputError(f"two directories hold modules of the same kernel: {', '.join(sorted(releases))}")
    contents = collect(runtime or find_python(), modules, environ=environ)
    folder = store / "initramfs"
    path = folder / f"{contents.digest(compression.recipe)[:32]}.cpio.{compression.suffix}"
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
            hint="free some space or rights there, or set FIREBUILD_HOME to another directory",
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
