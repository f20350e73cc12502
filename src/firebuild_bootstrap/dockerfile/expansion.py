"""Words of instructions: quotes, escapes and variables, as BuildKit's lexer for Dockerfiles reads them.

https://docs.docker.com/reference/dockerfile/#environment-replacement

The time it takes grows with the text and with what the variables in it hold, and that has a bound: a few
lines that double a variable again and again would otherwise fill any memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Final

from firebuild_bootstrap.dockerfile.syntax import Instruction, short
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.matching import BadPattern, Pattern
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

MAX_WORD: Final = 1024 * 1024
_MAX_NESTED: Final = 50  # the lexer recurses, and so could exhaust the stack of Python
# As Go's unicode.IsSpace.
_SPACES: Final = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SPACE: Final = re.compile(f"[{_SPACES}]+")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+|[@*#?$!-]")
# White space may stand between `<<` and its word.
_HEREDOC: Final = re.compile(r"<(?:<[\t\r ]*)?")


class ExpansionError(ValueError):
    """A word can't be expanded; the message says why."""


class MalformedWord(ExpansionError):
    """It is not written as the shell's rules want it: an escape may be missing."""


@dataclass(frozen=False)
class Budget:
    """How many characters the variables of a whole Dockerfile may still put in.

    Args:
        left: characters; one that a pattern is compared with counts several times, because it takes longer.
    """

    left: int = 64 * 1024 * 1024

    def spend(self, characters: int) -> None:
        """Take them from what is left.

        Raises:
            ExpansionError: there are not so many.
        """
        self.left -= characters
        if self.left < 0:
            raise ExpansionError("the variables of this Dockerfile expand to too much altogether")


@lru_cache(maxsize=16)
def _without(special: str) -> re.Pattern[str]:
    return re.compile(f"[^{re.escape(special)}]*")


class Lexer:
    """Reads one text.

    Args:
        text: a word, or the body of a heredoc.
        values: the variables; one that is not there is empty.
        escape: the escape character.
        budget: what the variables of the Dockerfile may still put in.
        limit: what those of this text may put in, in characters.
        quotes: whether quotes group and vanish; not in a heredoc.

    Attributes:
        found: the names that were looked up and have a value, in their order.
        missing: those that have none.
    """

    def __init__(
        self,
        text: str,
        values: Mapping[str, str],
        escape: str,
        budget: Budget,
        *,
        limit: int = MAX_WORD,
        quotes: bool = True,
    ) -> None:
        self._text = text
        self._values = values
        self._escape = escape
        self._budget = budget
        self._left = self._limit = limit
        self._quotes = "\"'" if quotes else ""
        self.found: dict[str, None] = {}
        self.missing: dict[str, None] = {}
        self._at = 0
        self._raw = False
        self._depth = 0

    def word(self) -> str:
        """Return the text as one word.

        Raises:
            ExpansionError: a quote or brace is never closed, a substitution is malformed, `${name?}` finds
                nothing, or the variables hold too much.
        """
        special = "$" + self._escape + self._quotes
        if _without(special).fullmatch(self._text):
            return self._text
        return self._scan()

    def words(self) -> list[str]:
        """Return the text split at white space outside of quotes; what variables hold is split as well.

        Raises:
            ExpansionError: as for `word`.
        """
        words = _Words()
        self._scan(words=words)
        return words.finish()

    def _scan(
        self,
        stop: str = "",
        *,
        raw: bool = False,
        pattern: bool = False,
        words: _Words | None = None,
    ) -> str:
        """Read to `stop` or the end.

        Args:
            stop: the character that ends it.
            raw: escape characters stay.
            pattern: it is a pattern, so an escape character inside quotes has to be doubled.
            words: where to put the words.
        """
        text, escape, before = self._text, self._escape, self._raw
        # A `<` matters for words only: `<< EOF` is one.
        plain = _without("$" + escape + self._quotes + stop + "<" * (words is not None))
        self._raw = raw
        pieces: list[str] = []
        while self._at < len(text):
            character = text[self._at]
            if character == stop:
                self._at += 1
                break
            divides = False
            if character == "$":
                pieces.append(self._dollar())
                divides = True
            elif character in self._quotes:
                pieces.append(self._single(pattern=pattern) if character == "'" else self._double())
            elif character == escape:
                pieces.append((escape if raw else "") + text[self._at + 1 : self._at + 2])
                self._at += 2
            else:
                divides = words is None or character != "<"
                pieces.append(self._match(plain if divides else _HEREDOC))
            if words is not None:
                words.add(pieces[-1], divides=divides)
        else:
            if stop:
                raise MalformedWord(f"syntax error: missing {stop!r}")
        self._raw = before
        return "".join(pieces)

    def _single(self, *, pattern: bool) -> str:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise MalformedWord("unexpected end of statement while looking for matching single-quote")
        quoted = self._text[self._at + 1 : end]
        self._at = end + 1
        return quoted.replace(self._escape, self._escape * 2) if pattern else quoted

    def _double(self) -> str:
        text, escape = self._text, self._escape
        plain = _without('"$' + escape)
        self._at += 1
        pieces: list[str] = []
        while self._at < len(text):
            character = text[self._at]
            if character == '"':
                self._at += 1
                return "".join(pieces)
            if character == "$":
                pieces.append(self._dollar())
            elif character != escape:
                pieces.append(self._match(plain))
            elif (after := text[self._at + 1 : self._at + 2]) in ('"', "$", escape):
                # The only ones that can be escaped here.
                pieces.append((escape if self._raw else "") + after)
                self._at += 2
            else:
                pieces.append(escape * (2 if self._raw else 1))
                self._at += 1
        raise MalformedWord("unexpected end of statement while looking for matching double-quote")

    # --- variables ------------------------------------------------------------------------------

    def _dollar(self) -> str:
        self._at += 1
        if self._peek() != "{":
            name = self._name()
            return self._spend(self._value(name) or "") if name else "$"
        self._at += 1
        if self._peek() in ("{", "}", ":"):
            raise MalformedWord("syntax error: bad substitution")
        name = self._name()
        modifier = self._next()
        if modifier == "}":
            return self._spend(self._value(name) or "")
        self._depth += 1
        if self._depth > _MAX_NESTED:
            raise MalformedWord(f"substitutions are nested more than {_MAX_NESTED} deep")
        value = self._replaced(name) if modifier == "/" else self._substituted(name, modifier)
        self._depth -= 1
        return value

    def _substituted(self, name: str, modifier: str) -> str:
        colon = modifier == ":"
        if colon:
            modifier = self._next()
        if modifier not in ("-+?" if colon else "-+?#%"):
            raise MalformedWord(f"unsupported modifier ({':' * colon}{modifier}) in substitution")
        trims = modifier in "#%"
        word = self._scan("}", raw=trims, pattern=trims)
        value = self._value(name)
        if trims:
            return self._trimmed(value or "", word, modifier)
        missing = value is None or (colon and not value)
        if modifier == "-":
            return word if value is None or missing else self._spend(value)
        if modifier == "+":
            return "" if missing else word
        if value is None or missing:
            why = "is not allowed to be unset" if value is None else "is not allowed to be empty"
            raise ExpansionError(f"{name}: {word or why}")
        return self._spend(value)

    def _trimmed(self, value: str, word: str, modifier: str) -> str:
        longest = word.startswith(modifier)
        pattern = self._pattern(word[longest:], value)
        if modifier == "#":
            return self._spend(pattern.without_prefix(value, longest=longest))
        return self._spend(pattern.without_suffix(value, longest=longest))

    def _replaced(self, name: str) -> str:
        every = self._peek() == "/"
        self._at += every
        text = self._scan("/", raw=True, pattern=True)
        replacement = self._scan("}", raw=True)
        value = self._value(name) or ""
        matches = self._pattern(text, value).matches_in(value, limit=None if every else 1)
        self._spend(value)
        self._spend(replacement, len(matches))
        pieces: list[str] = []
        end = 0
        for begin, until in matches:
            pieces += (value[end:begin], replacement)
            end = until
        return "".join((*pieces, value[end:]))

    def _pattern(self, text: str, value: str) -> Pattern:
        try:
            pattern = Pattern.shell(text)
        except BadPattern as error:
            raise MalformedWord(f"invalid pattern ({text:.80}) in substitution: {error}") from error
        self._budget.spend(pattern.weight * len(value))
        return pattern

    def _spend(self, value: str, times: int = 1) -> str:
        self._left -= len(value) * times
        if self._left < 0:
            raise ExpansionError(
                f"the variables in it expand to more than {counted(self._limit, 'character')}"
            )
        self._budget.spend(len(value) * times)
        return value

    def _value(self, name: str) -> str | None:
        value = self._values.get(name)
        (self.found if value is not None else self.missing)[name] = None
        return value

    def _name(self) -> str:
        # Letters of any script, which Go's unicode.IsLetter and IsDigit know; digits or one special
        # character are names of their own.
        name = self._match(_NAME)
        begin = self._at - len(name)
        if not name or name[0].isalpha() or name[0] == "_":
            while (character := self._peek()).isalpha() or character.isdecimal() or character == "_":
                self._at += 1
        return self._text[begin : self._at]

    def _match(self, expression: re.Pattern[str]) -> str:
        match = expression.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match[0] if match else ""

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        character = self._peek()
        if not character:
            raise MalformedWord("syntax error: missing '}'")
        self._at += 1
        return character


class _Words:
    """Words that are being put together."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._word: list[str] = []

    def add(self, text: str, *, divides: bool) -> None:
        """Add a piece; white space in it divides words, or belongs to one if it was quoted."""
        first, *others = _SPACE.split(text) if divides else (text,)
        self._word.append(first)
        for other in others:
            self.finish()
            self._word.append(other)

    def finish(self) -> list[str]:
        """End the word, and return all of them."""
        if word := "".join(self._word):
            self._words.append(word)
        self._word = []
        return self._words


class Expander:
    """Expands variables in the words of one instruction, all with the same values.

    Every method raises `InputError` if a substitution is malformed, `${name:?message}` finds nothing, or
    the variables hold too much.

    Args:
        instruction: whose words they are; errors point at it.
        values: the variables as they are before the instruction.
        escape: the escape character of the Dockerfile.
        budget: what the variables of the Dockerfile may still put in.
        missing: called with the variables of a word or heredoc that have no value.
    """

    def __init__(
        self,
        instruction: Instruction,
        values: Mapping[str, str],
        escape: str,
        budget: Budget,
        missing: Callable[[Iterable[str]], None] = lambda _: None,
    ) -> None:
        self._instruction = instruction
        self._values = values
        self._escape = escape
        self._budget = budget
        self._missing = missing

    def has_variables(self, text: str) -> bool:
        """Tell whether `text` is more than plain characters, which is a mistake where nothing is expanded."""
        try:
            return Lexer(text, {}, self._escape, self._budget).word() != text
        except ExpansionError:
            return True

    def word(self, text: str) -> str:
        """Return `text` as one word: quotes removed, variables replaced."""
        return self.looked_up(text)[0]

    def looked_up(self, text: str) -> tuple[str, Lexer]:
        """Return `text` as one word, and what knows the variables that were looked up for it."""
        lexer = Lexer(text, self._values, self._escape, self._budget)
        try:
            word = lexer.word()
        except ExpansionError as error:
            raise self._failed(f"failed to process {short(text)!r}", error, self._escape) from error
        self._missing(lexer.missing)
        return word, lexer

    def _failed(self, what: str, error: ExpansionError, escape: str) -> InputError:
        malformed = isinstance(error, MalformedWord)
        hint = f"write {escape} before a $ or a quotation mark that is meant as it is" if malformed else None
        return self._instruction.error(f"{what}: {error}", hint=hint)

    def words(self, text: str) -> list[str]:
        """Return `text` as words: what an unquoted variable holds is split at white space."""
        try:
            return Lexer(text, self._values, self._escape, self._budget).words()
        except ExpansionError as error:
            raise self._failed(f"failed to process {short(text)!r}", error, self._escape) from error

    def body(self, text: str) -> str:
        """Return the body of a heredoc: variables replaced, quotes left alone."""
        try:
            # Always a backslash, whatever the escape directive says: heredocs follow the shell.
            lexer = Lexer(text, self._values, "\\", self._budget, limit=self._budget.left, quotes=False)
            body = lexer.word()
        except ExpansionError as error:
            raise self._failed("in a heredoc", error, "\\") from error
        self._missing(lexer.missing)
        return body
