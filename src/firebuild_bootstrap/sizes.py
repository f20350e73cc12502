"""Sizes and switches as people write them: in settings, options and instructions."""

from __future__ import annotations

import re
from typing import Final

# As github.com/docker/go-units reads them (RAMInBytes): powers of 1024, whether there is an i or not. No more
# digits than a float holds.
_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s?([kmgtp])?(?:i?b)?", re.IGNORECASE | re.ASCII)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def checked_size(value: object) -> int:
    """Return the number of bytes that a record of ours has; ValueError if no file can have so many."""
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"expected a size in bytes, found {value!r:.80}")
    return value


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `64MiB`, `1.5g` or `4096` means.

    Raises:
        ValueError: it is not a size.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"expected a size such as 64MiB, found {text!r:.80}")
    return int(float(found[1]) * 1024 ** _POWERS[(found[2] or "").lower()])


def human_size(size: int) -> str:
    """Write a number of bytes with a binary unit and three significant digits: `67.1 MiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def parse_bool(text: str) -> bool | None:
    """Read a switch as Go's strconv.ParseBool does; None if it is not one."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    return False if text in ("0", "f", "F", "FALSE", "false", "False") else None
