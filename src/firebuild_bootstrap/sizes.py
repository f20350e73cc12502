"""Sizes, switches and lists as people write them: in settings, options and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# As github.com/docker/go-units reads them (RAMInBytes): powers of 1024, whether there is an i or not. No more
# digits than a float holds.
_SIZE: Final = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s?([kmgtp])?(?:i?b)?", re.IGNORECASE | re.ASCII)
# RFC 4180, as github.com/tonistiigi/go-csvvalue reads it for BuildKit and buildx: one line, no lenience.
_FIELD: Final = re.compile(r'"((?:[^"]|"")*+)"|([^",]*)')
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


def split_fields(text: str) -> list[str]:
    """Split what options such as `--output` and `--mount` take: members with commas in between, as in CSV.

    A member in double quotes may hold commas, and double quotes that are doubled: `"dest=a,b"`.

    Raises:
        ValueError: a double quote is where none can be. It shows nothing of the text, which may be secret.
    """
    if text.endswith("\n"):
        text = text[:-1].removesuffix("\r")
    fields = list[str]()
    end = -1
    while text and end < len(text):
        found = _FIELD.match(text, end + 1)
        assert found is not None  # noqa: S101 - an empty member matches, too
        start, end = found.span()
        if text[end : end + 1] not in ("", ","):
            if found[1] is not None:
                raise ValueError(f"expected a comma after the double quote that is character {end}")
            if start == end:
                raise ValueError(f"the double quote that is character {end + 1} has no end")
            raise ValueError(
                f"the double quote that is character {end + 1} is within a member: "
                'put the whole member in double quotes, and double those in it, as in "dest=a""b,c"'
            )
        fields.append(found[2] if found[1] is None else found[1].replace('""', '"'))
    return fields


def join_fields(fields: Iterable[str]) -> str:
    """Return the text that `split_fields` splits into these members."""
    return ",".join(
        '"{}"'.format(field.replace('"', '""')) if '"' in field or "," in field else field for field in fields
    )
