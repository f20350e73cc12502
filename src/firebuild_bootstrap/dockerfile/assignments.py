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
        InputError: there is no name before `=`. The value, which may be a secret, is not shown.
    """
    pairs: dict[str, str | None] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name.strip():
            raise InputError(f"{option}: expected NAME=VALUE, found no name before =")
        pairs[name] = value if equals else None
    return pairs
