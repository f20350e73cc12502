"""NAME=VALUE on the command line (`--build-arg`, `--label`)."""

from __future__ import annotations

from collections.abc import Iterable

from firebuild_bootstrap.errors import InputError


def parse_assignments(values: Iterable[str], option: str) -> dict[str, str | None]:
    """Read the values of an option that takes NAME=VALUE; NAME alone gives None, and the last one wins.

    Args:
        values: as given by the user.
        option: what to call it in messages, for example `--build-arg`.

    Raises:
        InputError: there is no name before `=`, or bytes that are no text. The value, which may be a
            secret, is not shown.
    """
    pairs: dict[str, str | None] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name.strip():
            raise InputError(f"{option}: expected NAME=VALUE, found no name before =")
        if not _is_text(name):
            raise InputError(f"{option}: the name {name!r} is not UTF-8")
        if not _is_text(value):
            raise InputError(f"{option}: the value of {name} is not UTF-8")
        pairs[name] = value if equals else None
    return pairs


def _is_text(text: str) -> bool:
    # Bytes of the command line that are not UTF-8 become lone surrogates (PEP 383).
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
