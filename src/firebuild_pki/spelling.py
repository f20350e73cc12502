"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """Find the name that a misspelt word was meant to be, if one is near enough."""
    import difflib  # for mistakes only

    matches = difflib.get_close_matches(word, sorted(known), n=1)
    return matches[0] if matches else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Word a hint for a misspelt name: the nearest known one, else all of them, else None."""
    names = sorted(known)
    match = closest(word, names)
    if match is not None:
        return f'did you mean "{match}"?'
    return f"known are: {', '.join(names)}" if names else None
