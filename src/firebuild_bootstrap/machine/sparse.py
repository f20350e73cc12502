"""Files with holes, such as drives: copied and moved so that holes stay holes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import MachineError

_PIECE: Final = 64 << 20


def copy_sparse(source: Path, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy a file to the new file `target`, mode 0600; holes stay holes.

    Args:
        check: called between pieces; what it raises ends the copy and removes the target.

    Raises:
        MachineError: the disk is full, or a file can't be read or written.
    """
    try:
        with open(source, "rb") as reading:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(descriptor, "wb") as writing:
                    size = os.fstat(reading.fileno()).st_size
                    os.truncate(writing.fileno(), size)
                    _copy_data(reading.fileno(), writing.fileno(), size, check)
            except BaseException:
                target.unlink()
                raise
    except OSError as error:
        raise MachineError(f"{source} can't be copied to {target}: {error.strerror}") from error


def move_sparse(source: Path, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Rename a file, or copy it where `target` is on another file system; see `copy_sparse`."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise MachineError(f"{source} can't be moved to {target}: {error.strerror}") from error
        copy_sparse(source, target, check)
        source.unlink()


def _copy_data(reading: int, writing: int, size: int, check: Callable[[], None]) -> None:
    place = 0
    while place < size:
        try:
            begin = os.lseek(reading, place, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        place = os.lseek(reading, begin, os.SEEK_HOLE)
        os.lseek(writing, begin, os.SEEK_SET)
        while begin < place:
            check()
            begin += os.sendfile(writing, reading, begin, min(place - begin, _PIECE))
