"""Paths that users write, which may begin with ``~``.

A user may have no home directory: a user id of a container has neither an entry nor HOME.
"""

from __future__ import annotations

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
