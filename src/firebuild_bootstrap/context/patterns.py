"""Wildcards of COPY and ADD sources: the rules of Go's `filepath.Match`, which Docker applies.

https://pkg.go.dev/path/filepath#Match
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WILDCARDS: Final = frozenset("*?[")


class BadPattern(ValueError):
    """The pattern is malformed; the message says why."""


@dataclass(frozen=True)
class _Literal:
    character: str

    def accepts(self, character: str) -> bool:
        return character == self.character


@dataclass(frozen=True)
class _AnyCharacter:
    def accepts(self, character: str) -> bool:
        return character != "/"


@dataclass(frozen=True)
class _Class:
    ranges: tuple[tuple[str, str], ...]
    negated: bool

    def accepts(self, character: str) -> bool:
        return any(low <= character <= high for low, high in self.ranges) != self.negated


class _Star:
    """Any run of characters other than `/`."""


_Token = _Literal | _AnyCharacter | _Class | _Star


def has_wildcard(text: str) -> bool:
    """Tell whether `text` is a pattern: it holds `*`, `?` or `[`."""
    return not _WILDCARDS.isdisjoint(text)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern."""

    tokens: tuple[_Token, ...]

    @classmethod
    def compile(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            BadPattern: an escape or a character class is malformed.
        """
        tokens: list[_Token] = []
        position = 0
        while position < len(text):
            character = text[position]
            position += 1
            if character == "*":
                tokens.append(_Star())
            elif character == "?":
                tokens.append(_AnyCharacter())
            elif character == "[":
                token, position = _read_class(text, position)
                tokens.append(token)
            elif character == "\\":
                if position == len(text):
                    raise BadPattern("it ends in a single backslash")
                tokens.append(_Literal(text[position]))
                position += 1
            else:
                tokens.append(_Literal(character))
        return cls(tuple(tokens))

    def matches(self, name: str) -> bool:
        """Tell whether the pattern covers the whole of `name`, in time proportional to both lengths."""
        at = index = 0
        # The last star seen: its token index, and how far into the name it reaches.
        star, reach = -1, 0
        while at < len(name) or index < len(self.tokens):
            token = self.tokens[index] if index < len(self.tokens) else None
            if isinstance(token, _Star):
                star, reach = index, at
                index += 1
            elif token is not None and at < len(name) and token.accepts(name[at]):
                at, index = at + 1, index + 1
            elif star >= 0 and reach < len(name) and name[reach] != "/":
                reach += 1
                at, index = reach, star + 1
            else:
                return False
        return True


def _read_class(text: str, position: int) -> tuple[_Class, int]:
    negated = text[position : position + 1] == "^"
    position += negated
    ranges: list[tuple[str, str]] = []
    while not (ranges and text[position] == "]"):
        low, position = _class_character(text, position)
        high = low
        if text[position] == "-":
            high, position = _class_character(text, position + 1)
        ranges.append((low, high))
    return _Class(tuple(ranges), negated), position + 1


def _class_character(text: str, position: int) -> tuple[str, int]:
    if text[position : position + 1] == "\\":
        position += 1
    elif text[position : position + 1] in ("-", "]"):
        raise BadPattern(f"{text[position]!r} inside [ ] has to be escaped with a backslash")
    # The character and at least one more, since the class has to be closed.
    if position + 1 >= len(text):
        raise BadPattern("a [ is never closed")
    return text[position], position + 1
