"""Wildcards without backtracking: one automaton, and the dialects that Docker has for patterns.

A pattern becomes a nondeterministic automaton whose states are the bits of one integer, and every character
of a text moves all of them at once (Shift-And with gaps; Navarro and Raffinot, Flexible Pattern Matching in
Strings, chapter 4). So no pattern and no text can make a match take longer than their lengths multiplied,
which regular expressions, with their backtracking, cannot promise.

Dialects: `Pattern.path` is Go's `filepath.Match` (sources of COPY and ADD), `IgnorePattern` a line of a
`.dockerignore`, `Pattern.shell` the pattern of `${name#pattern}` and its like.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from firebuild_pki.values import dataclass

_WILDCARDS: Final = frozenset("*?[")
_SPECIAL: Final = frozenset("*?[]\\")


class BadPattern(ValueError):
    """The pattern is malformed; the message says why."""


@dataclass(frozen=True)
class CharacterSet:
    """The characters in `ranges` (first and last of each), or all others."""

    ranges: tuple[tuple[str, str], ...] = ()
    negated: bool = False

    def accepts(self, character: str) -> bool:
        """Tell whether the character belongs to the set."""
        return any(low <= character <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True)
class Star:
    """Any run of characters of a set."""

    characters: CharacterSet


@dataclass(frozen=True)
class Globstar:
    """Nothing, or a run of characters of a set that ends in `/`."""

    characters: CharacterSet


Token = str | CharacterSet | Star | Globstar

_EVERYTHING: Final = CharacterSet(negated=True)
_IN_LINE: Final = CharacterSet((("\n", "\n"),), negated=True)
_IN_NAME: Final = CharacterSet((("/", "/"),), negated=True)


class Automaton:
    """Several patterns side by side, each a sequence of tokens (a `str` is one character).

    A state is an integer: bit `begin[n]` plus k says that the text so far fits the first k steps of pattern
    n, bit `end[n]` that it fits the whole of it.
    """

    def __init__(self, patterns: Iterable[Sequence[Token]]) -> None:
        self.begin: list[int] = []
        self.end: list[int] = []
        literals: defaultdict[str, list[int]] = defaultdict(list)
        sets: defaultdict[CharacterSet, list[int]] = defaultdict(list)
        loops: defaultdict[CharacterSet, list[int]] = defaultdict(list)
        optional: list[int] = []
        bit = 0
        for tokens in patterns:
            self.begin.append(bit)
            for before, token in zip((None, *tokens), tokens, strict=False):
                match token:
                    case Star(characters):
                        loops[characters].append(bit)
                    case Globstar() if isinstance(before, Globstar):
                        pass  # the second of two adds nothing
                    case Globstar(characters):
                        optional.append(bit)
                        loops[characters].append(bit + 1)
                        literals["/"].append(bit + 2)
                        bit += 2
                    case CharacterSet():
                        bit += 1
                        sets[token].append(bit)
                    case _:
                        bit += 1
                        literals[token].append(bit)
            self.end.append(bit)
            bit += 1
        self._literals = {character: _mask(bits) for character, bits in literals.items()}
        self._sets = [(characters, _mask(bits)) for characters, bits in sets.items()]
        self._loops = [(characters, _mask(bits)) for characters, bits in loops.items()]
        self._optional = _mask(optional)
        # By character: the states that it leads to from the one before, and those in which it may stay.
        self._moves: dict[str, tuple[int, int]] = {}
        self.start = self._skip(_mask(self.begin))
        self.accepting = _mask(self.end)

    def read(self, state: int, text: str) -> int:
        """Return the state after `text`."""
        for character in text:
            if not state:
                break
            state = self.step(state, character)
        return state

    def step(self, state: int, character: str) -> int:
        """Return the state after one character; 0 is the one that nothing leads out of."""
        moves = self._moves.get(character) or self._moves_of(character)
        return self._skip((state << 1) & moves[0] | state & moves[1])

    def _skip(self, state: int) -> int:
        # Once is enough: no dialect has two tokens in a row that may stand for nothing and move the state.
        skipped = state & self._optional
        return state | skipped << 1 | skipped << 2

    def _moves_of(self, character: str) -> tuple[int, int]:
        forward = self._literals.get(character, 0)
        for characters, bits in self._sets:
            if characters.accepts(character):
                forward |= bits
        stay = 0
        for characters, bits in self._loops:
            if characters.accepts(character):
                stay |= bits
        self._moves[character] = forward, stay
        return forward, stay


def _mask(bits: Sequence[int]) -> int:
    data = bytearray(max(bits, default=0) // 8 + 1)
    for bit in bits:
        data[bit // 8] |= 1 << bit % 8
    return int.from_bytes(data, "little")


class Pattern:
    """One pattern.

    Args:
        tokens: what it consists of; without `Globstar` where `replaced`, `without_prefix` or
            `without_suffix` are asked for.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)
        self._literal = "".join(token for token in self._tokens if isinstance(token, str))
        self._is_literal = len(self._literal) == len(self._tokens)
        self._forward = Automaton([self._tokens])

    @classmethod
    def path(cls, text: str) -> Pattern:
        """Read a pattern of https://pkg.go.dev/path/filepath#Match: `*` and `?` stay within a name.

        Raises:
            BadPattern: an escape or a character class is malformed.
        """
        return cls(_path_tokens(text))

    @classmethod
    def shell(cls, text: str) -> Pattern:
        """Read a pattern of `${name#pattern}`: `*` and `?` stay within a line, and there are no classes.

        A backslash makes `*`, `?` and itself ordinary; before `}` and `/`, which would end the pattern, it
        is dropped. Everything else after it is an error, as in BuildKit.

        Raises:
            BadPattern: a backslash stands before something else.
        """
        tokens: list[Token] = []
        position = 0
        while position < len(text):
            character = text[position]
            position += 1
            if character == "*":
                tokens.append(Star(_IN_LINE))
            elif character == "?":
                tokens.append(_IN_LINE)
            elif character == "\\" and text[position : position + 1] in ("}", "/"):
                pass
            elif character == "\\":
                character = text[position : position + 1]
                if character not in ("*", "?", "\\"):
                    raise BadPattern(f"invalid escape '\\{character}'")
                tokens.append(character)
                position += 1
            else:
                tokens.append(character)
        return cls(tokens)

    @property
    def weight(self) -> int:
        """How many times as long as a plain comparison a match may take."""
        return 1 if self._is_literal else 8 + len(self._tokens) // 64

    def matches(self, text: str) -> bool:
        """Tell whether the pattern covers the whole of `text`."""
        if self._is_literal:
            return text == self._literal
        return bool(self._forward.read(self._forward.start, text) & self._forward.accepting)

    def without_prefix(self, text: str, *, longest: bool) -> str:
        """Return `text` without the shortest or longest beginning that the pattern covers."""
        if self._is_literal:
            return text.removeprefix(self._literal)
        return text[max(self._covered(text, 0, longest=longest), 0) :]

    def without_suffix(self, text: str, *, longest: bool) -> str:
        """Return `text` without the shortest or longest end that the pattern covers."""
        return Pattern(self._tokens[::-1]).without_prefix(text[::-1], longest=longest)[::-1]

    def matches_in(self, text: str, *, limit: int | None = None) -> list[tuple[int, int]]:
        """Return where the pattern covers something: begin and end of each match, which do not overlap.

        Of several at one place it is the longest; an empty one right after another does not count.

        Args:
            text: what to search.
            limit: stop after so many matches.
        """
        if self._is_literal and self._literal:
            return self._literal_in(text, limit)
        # Where a match can begin is where one of the reversed pattern can end.
        backward = Automaton([self._tokens[::-1]])
        state = backward.start
        begins = bytearray(len(text) + 1)
        begins[-1] = bool(state & backward.accepting)
        for at in range(len(text) - 1, -1, -1):
            state = backward.step(state, text[at]) | backward.start
            begins[at] = bool(state & backward.accepting)
        found: list[tuple[int, int]] = []
        last = -1
        at = begins.find(1)
        while at >= 0 and (limit is None or len(found) < limit):
            end = self._covered(text, at, longest=True)
            if end > at or at != last:
                found.append((at, end))
            last = end
            at = begins.find(1, max(end, at + 1))
        return found

    def _literal_in(self, text: str, limit: int | None) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = text.find(self._literal)
        while at >= 0 and (limit is None or len(found) < limit):
            end = at + len(self._literal)
            found.append((at, end))
            at = text.find(self._literal, end)
        return found

    def _covered(self, text: str, begin: int, *, longest: bool) -> int:
        """Return the end of the shortest or longest match that begins at `begin`, or -1."""
        automaton = self._forward
        state, accepting = automaton.start, automaton.accepting
        found = begin if state & accepting else -1
        for at in range(begin, len(text)):
            if found >= 0 and not longest:
                break
            state = automaton.step(state, text[at])
            if not state:
                break
            if state & accepting:
                found = at + 1
        return found


def has_wildcard(text: str) -> bool:
    """Tell whether `text` is a pattern for `filepath.Match`: it holds `*`, `?` or `[`."""
    return not _WILDCARDS.isdisjoint(text)


def _path_tokens(text: str, *, globstars: bool = False) -> list[Token]:
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if globstars and text.startswith("**", position - 1):
            position += 2 if text[position + 1 : position + 2] == "/" else 1
            tokens.append(Globstar(_IN_LINE) if position < len(text) else Star(_IN_LINE))
        elif character == "*":
            tokens.append(Star(_IN_NAME))
        elif character == "?":
            tokens.append(_IN_NAME)
        elif character == "[":
            token, position = _read_class(text, position)
            if globstars and any(low > high for low, high in token.ranges):
                raise BadPattern("a range inside [ ] runs backwards")
            tokens.append(token)
        elif character == "\\":
            if position == len(text):
                raise BadPattern("it ends in a single backslash")
            tokens.append(text[position])
            position += 1
        else:
            tokens.append(character)
    return tokens


def _read_class(text: str, position: int) -> tuple[CharacterSet, int]:
    negated = text[position : position + 1] == "^"
    position += negated
    ranges: list[tuple[str, str]] = []
    while not (ranges and text[position] == "]"):
        low, position = _class_character(text, position)
        high = low
        if text[position] == "-":
            high, position = _class_character(text, position + 1)
        ranges.append((low, high))
    return CharacterSet(tuple(ranges), negated), position + 1


def _class_character(text: str, position: int) -> tuple[str, int]:
    if text[position : position + 1] == "\\":
        position += 1
    elif text[position : position + 1] in ("-", "]"):
        raise BadPattern(f"{text[position]!r} inside [ ] has to be escaped with a backslash")
    # The character and at least one more, since the class has to be closed.
    if position + 1 >= len(text):
        raise BadPattern("a [ is never closed")
    return text[position], position + 1


@dataclass(frozen=True)
class IgnorePattern:
    """A line of an ignore file.

    Args:
        keeps: it begins with `!`: what it covers is not ignored.
        text: the path or pattern, cleaned and without `/` in front.
        is_path: it holds no wildcard and covers the path `text` alone.
        tokens: what to match with; none where it is a path, which is looked up.
    """

    keeps: bool
    text: str
    is_path: bool
    tokens: tuple[Token, ...]

    @classmethod
    def parse(cls, line: str) -> IgnorePattern | None:
        """Read a line; None if it says nothing.

        https://docs.docker.com/build/concepts/context/#dockerignore-files

        Raises:
            BadPattern: the pattern is malformed.
        """
        text = "" if line.startswith("#") else line.strip()
        keeps = text.startswith("!")
        if keeps:
            text = text[1:].strip()
            if not text:
                raise BadPattern("illegal exclusion pattern, there is nothing after the !")
        if not text:
            return None
        text = posixpath.normpath(re.sub("/+", "/", text))
        if len(text) > 1:
            text = text.removeprefix("/")
        if _SPECIAL.isdisjoint(text):
            return cls(keeps, text, is_path=True, tokens=())
        tokens = tuple(_path_tokens(text, globstars=True))
        return cls(keeps, text, is_path=False, tokens=_plain_globstar(text) or tokens)


def _plain_globstar(text: str) -> tuple[Token, ...] | None:
    # Moby's matcher compares these as text: `**` at an end stands for everything, across `/` and in `**x`
    # even for the beginning of a name, which it does not in `**x*`.
    if text.startswith("**") and _SPECIAL.isdisjoint(rest := text[2:]):
        return (Globstar(_EVERYTHING), *rest[1:]) if rest.startswith("/") else (Star(_EVERYTHING), *rest)
    if text.endswith("**") and _SPECIAL.isdisjoint(rest := text[:-2]):
        return (*rest, Star(_EVERYTHING))
    return None
