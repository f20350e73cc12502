"""Untrusted text, fit for a terminal or a log: what could move a cursor is shown, not obeyed.

Providers, guests, servers, archives and file names bring text that firebuild did not write. Whatever of it
reaches a person goes through here: control characters, bidirectional overrides and bytes that are not UTF-8
come out as escapes of Python's string literals, and a long text is cut.
"""

from __future__ import annotations

from typing import Final

LINE_LIMIT: Final = 500
"""Characters that `one_line` keeps unless told otherwise."""

BLOCK_LIMIT: Final = 16_000
"""Characters that `block` keeps unless told otherwise."""


def one_line(text: str, limit: int = LINE_LIMIT) -> str:
    """Make one harmless line of a text.

    Args:
        text: may hold anything, lone surrogates included.
        limit: characters of it to keep.

    Returns:
        printable characters only; runs of white space are single spaces, and a line that was longer says
        how long the text is.
    """
    # A megabyte of blanks is cut before it is folded.
    line = escaped(" ".join(text[: 4 * limit].split()))
    if len(line) <= limit and len(text) <= 4 * limit:
        return line
    return f"{line[:limit]}… ({counted(len(text), 'character')} in all)"


def block(text: str, limit: int = BLOCK_LIMIT) -> str:
    """Make a text of several lines harmless: like `one_line`, but lines and their indents are kept.

    Args:
        text: may hold anything, lone surrogates included.
        limit: characters of it to keep.
    """
    lines = [escaped(line.removesuffix("\r")) for line in text[:limit].expandtabs().split("\n")]
    shown = "\n".join(lines)
    if len(text) <= limit:
        return shown
    return f"{shown[:limit]}… ({counted(len(text), 'character')} in all)"


def counted(number: float, noun: str) -> str:
    """Write a number and what it counts: `1 byte`, `2 bytes`, `0.5 seconds`.

    Args:
        number: an integer as it is; of others as many digits as `g` has.
        noun: its singular, whose plural ends with an s.
    """
    shown = str(number) if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if shown == '1' else 's'}"


def text_of(value: object) -> str:
    """Return the text of anything, as a plain `str`; never raises, whatever a `__str__` of others does."""
    try:
        # of a subclass of str, the text in it
        return str.__str__(value if isinstance(value, str) else str(value))
    except KeyboardInterrupt:
        raise
    except BaseException:  # a __str__ that fails is no reason to lose the rest
        return f"(a {type(value).__name__} that does not say more)"


def error_text(error: BaseException, limit: int = LINE_LIMIT) -> str:
    """Describe an exception of any class in one safe line: ``KeyError: 'certificate'``."""
    name = one_line(text_of(type(error).__name__), 100)
    return f"{name}: {one_line(text_of(error), limit)}".removesuffix(": ")


def escaped(text: str) -> str:
    r"""Write what is not printable as escapes: `\x1b`, `\u202e`, and `\xff` for bytes that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escape(one) for one in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how PEP 383 carries a byte that could not be decoded
        code -= 0xDC00
    if code < 0x100:
        return {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character, f"\\x{code:02x}")
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
