"""Variables as lines that a shell reads, whatever their values contain."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from .errors import InputError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # POSIX, Base Definitions 3.231


def exports(env: Mapping[str, str]) -> list[str]:
    """Return one `export` per variable, sorted by name.

    Raises:
        InputError: a name is none, or a value contains NUL.
    """
    lines = []
    for name, value in sorted(env.items()):
        if not _NAME.fullmatch(name):
            raise InputError(f"Env of the metadata: {name!r} is no name of a variable")
        if not isinstance(value, str) or "\0" in value:
            raise InputError(f"Env of the metadata: {name} is no text without NUL")
        lines.append(f"export {name}={shlex.quote(value)}")
    return lines
