"""Paths that users write, which may begin with ``~`` or lead to something else than was meant.

A user may have no home directory: a user id of a container has neither an entry nor HOME.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path


def expanded(path: str) -> str | None:
    """Expand ``~`` in the path of what may be made there; None where nobody's home directory is known for it.

    In a directory that is called ``~`` it would not be found again.
    """
    found = os.path.expanduser(path)
    return None if found.startswith("~") else found


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return the path that a setting names: with ``~`` expanded, and from the current directory."""
    return Path(os.path.expanduser(path)).absolute()


def read_small(path: str | os.PathLike[str], most: int) -> bytes:
    """Return what is in a file that has to be small: a wrong path may be that of a device or a whole disk.

    Raises:
        OSError: it can't be read; EFBIG where it has more than `most` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", path)
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
