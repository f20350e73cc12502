"""The finished initramfs, made once for the same inputs and then taken from the store."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs.compress import Compression, compress
from firebuild_bootstrap.initramfs.contents import collect
from firebuild_bootstrap.initramfs.cpio import write_archive
from firebuild_bootstrap.initramfs.modules import read_modules
from firebuild_bootstrap.initramfs.runtime import PythonRuntime, find_python

_KEPT_SECONDS: Final = 30 * 24 * 3600


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
    """Write the file in one step, so that nobody ever sees a part of it."""
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
    """Remove what nobody has used for long: other versions, other kernels, what a crash left."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > _KEPT_SECONDS:
                path.unlink()
