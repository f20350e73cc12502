"""Sizes as people write them in settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

_SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_size(value: object) -> int:
    """Read a number of bytes, or a text such as `64MiB`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value)
    for unit, factor in sorted(_SIZE_UNITS.items(), key=lambda item: -len(item[0])):
        number = text.removesuffix(unit).strip()
        if text.endswith(unit) and number.isdecimal():
            return int(number) * factor
    raise ValueError(f'expected a size such as 64MiB (B, KiB, MiB, GiB), found "{text}"')


ByteSize = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=1024)]
