"""Paths that users write, which may begin with ``~`` or lead to something else than was meant.

A user may have no home directory: a user id of a container has neither an entry nor HOME.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def expanded(path: str) -> str | None:
    """Expand ``~`` in the path of what may be made there; None where nobody's home directory is known for it.

    In a directory that is called ``~`` it would not be found again.
    """
    found = os.path.expanduser(path)
    return None if found.startswith("~") else found


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path that a setting names: with ``~`` expanded, and from the current directory."""
    return Path(os.path.expanduser(path)).absolute()


PATIENCE = 10.0
"""Seconds that a setting waits for what is in a pipe; a user's own pipe on the command line has no limit."""


def read_small(path: str | os.PathLike[str], most: int, patience: float | None = PATIENCE) -> bytes:
    """Return what is in a file that has to be small: a wrong path may be that of a device or a whole disk.

    Args:
        path: of a file, or of a pipe into which somebody writes it.
        most: bytes that it may have.
        patience: how many seconds to wait for what comes from a pipe or a device; None for no limit.

    Raises:
        OSError: it can't be read; EFBIG where it has more than `most` bytes, ETIMEDOUT where they don't end.
    """
    # Non-blocking: opening a FIFO would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        data = file.read(most + 1) if is_file else _from_pipe(file.fileno(), most, patience)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", path)
    return data


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, whatever else is there.

    Raises:
        OSError: it can't be read, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return os.fdopen(descriptor, "rb")


def _from_pipe(descriptor: int, most: int, patience: float | None) -> bytes:
    end = None if patience is None else time.monotonic() + patience
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    data = b""
    while len(data) <= most:
        left = None if end is None else max(end - time.monotonic(), 0)
        if not poll.poll(None if left is None else left * 1000):
            raise OSError(
                errno.ETIMEDOUT, f"it is no file, and what comes from it has no end after {patience:g} s"
            )
        try:
            piece = os.read(descriptor, most + 1 - len(data))
        except BlockingIOError:  # a device that is ready, and has nothing
            time.sleep(0.01)
            continue
        if not piece:
            break
        data += piece
    return data


def own_directory(find: Callable[[str], str]) -> Path | None:
    """Return where firebuild keeps something for this user; None for a user without a home directory.

    Args:
        find: of platformdirs, such as ``user_data_dir``.
    """
    try:
        found = Path(find("firebuild"))
    except RuntimeError:
        return None
    return found if found.is_absolute() else None  # older releases answer ~
