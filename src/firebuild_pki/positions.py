"""Positions of settings for messages: paths of keys, lines and columns of files, names that are close."""

from __future__ import annotations

from collections.abc import Iterable

from firebuild_pki.errors import Problem
from firebuild_pki.values import dataclass

KeyPath = tuple[str | int, ...]

_KINDS = {dict: "a mapping", list: "a list", str: "a string", bool: "a boolean"}


def kind_of(value: object) -> str:
    """Name the YAML kind of a value, for messages that must not show the value itself."""
    if value is None:
        return "nothing"
    return _KINDS.get(type(value), "a number")


def dotted(path: KeyPath) -> str:
    """Write a path the way people do: ``ca.vault.address``, ``stages[2].name``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a key or a value comes from; line and column are 1-based, or None outside of files."""

    source: str
    line: int | None = None
    column: int | None = None

    def problem(self, path: KeyPath, message: str, hint: str | None = None) -> Problem:
        """Describe a mistake at this position."""
        return Problem(self.source, self.line, self.column, dotted(path), message, hint)


def closest(word: str, known: Iterable[str]) -> str | None:
    """Find the name that a misspelt word was meant to be, if one is near enough."""
    import difflib  # for mistakes only

    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return matches[0] if matches else None


def nearest_setting(word: str, known: Iterable[str]) -> str | None:
    """Word a hint for an unknown setting: as `nearest`, or that two underscores lead into a section."""
    names = sorted(known)
    match = closest(word, names)
    for name in (name for name in names if match in (None, name)):
        if word.startswith(f"{name}_") and (below := word[len(name) + 1 :]):
            variable = f"{name}__{below}".upper()
            return f'did you mean "{name}.{below}"? an environment variable has it as …{variable}'
    return nearest(word, names)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Word a hint for a misspelt name: the nearest known one, else all of them, else None."""
    names = sorted(known)
    match = closest(word, names)
    if match is not None:
        return f'did you mean "{match}"?'
    return f"known are: {', '.join(names)}" if names else None
