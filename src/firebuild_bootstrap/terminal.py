"""Output for a terminal: text that can't control it, lines that fit, and a live line at the bottom.

The control sequences are those of the VT100 and of ECMA-48, which every terminal in use understands.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, BinaryIO, Final, Literal

from firebuild_pki.display import escaped

_SGR: Final = r"\x1b\[[0-9;:]{0,64}m"
# What passes besides printable text; spaces of other widths are not printable to Python.
_PASSED: Final = re.compile(rf"({_SGR}|[\n\r\t\xa0\u2000-\u200a\u202f\u205f\u3000]+)")
_SEQUENCE: Final = re.compile(_SGR)
_UNFINISHED: Final = re.compile(r"\x1b(?:\[[0-9;:]{0,64})?\Z")
_RESET: Final = "\x1b[0m"
_EMOJI_STYLE: Final = "\ufe0f"
_TAB: Final = 8


def colours_wanted(environ: Mapping[str, str]) -> bool:
    """Whether a terminal is to be coloured: not with NO_COLOR (no-color.org), nor if it is a dumb one."""
    return not environ.get("NO_COLOR") and not is_dumb(environ)


def is_dumb(environ: Mapping[str, str]) -> bool:
    """Whether the terminal understands no control sequences."""
    return environ.get("TERM", "dumb") in ("", "dumb")


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes at most; it has to be printable."""
    if text.isascii():
        return len(text)
    from wcwidth import wcwidth  # its tables take a while, and few builds need them

    # Terminals do not agree on U+FE0F, which makes an emoji of the character before it.
    return sum(1 if one == _EMOJI_STYLE else max(wcwidth(one), 0) for one in text)


def fit(text: str, room: int) -> str:
    """Cut a printable text to `room` cells; what was cut shows as an ellipsis."""
    if cells(text) <= room:
        return text
    kept = sum(used < room for used in accumulate(map(cells, text)))
    return text[:kept] + "…" if room > 0 else ""


def json_text(document: Any, indent: int | None = None) -> str:
    """Write JSON that can be shown anywhere: what is not printable is escaped, lone surrogates included."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)


class SafeStream:
    """Makes one stream of a step's output fit for a terminal, piece by piece.

    Printable text, newlines, tabs, carriage returns (progress bars) and SGR sequences (colours, ECMA-48
    8.3.117) pass. Everything else, which might move the cursor, set titles or make the terminal answer, comes
    out escaped. Characters and sequences may be cut between two pieces.

    Args:
        colours: SGR sequences pass; otherwise they are left out.
    """

    def __init__(self, *, colours: bool = True) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._colours = colours
        self._unfinished = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """Return what can be shown so far; all of it when this piece is the `final` one."""
        text = self._unfinished + self._decoder.decode(data, final)
        cut = None if final else _UNFINISHED.search(text)
        self._unfinished = text[cut.start() :] if cut else ""
        parts = _PASSED.split(text.removesuffix(self._unfinished))
        parts[::2] = [escaped(part) for part in parts[::2]]
        return "".join(part for part in parts if self._colours or not part.startswith("\x1b"))


class SafeOutput:
    """Makes the output of steps fit for a terminal: each stream by itself, and together as they come."""

    def __init__(self, *, colours: bool = True) -> None:
        self._colours = colours
        self._streams: dict[str, SafeStream] = {}

    def feed(self, stream: Literal["stdout", "stderr"], data: bytes) -> str:
        """Return what can be shown of one more piece."""
        if stream not in self._streams:
            self._streams[stream] = SafeStream(colours=self._colours)
        return self._streams[stream].feed(data)

    def finish(self) -> str:
        """Return what was held back as the begin of something; the step has ended."""
        rest = "".join(stream.feed(b"", final=True) for stream in self._streams.values())
        self._streams.clear()
        return rest


class Screen:
    """A terminal with a status line at the bottom, below all output.

    The cursor is never hidden and always rests where the next output goes. So whatever happens to this
    process, or to the size of the terminal, erasing what is behind it removes the live line and nothing else.

    Args:
        out: the terminal.
        size: returns its columns and rows; asked at each drawing, for both may change at any time.
    """

    def __init__(self, out: BinaryIO, size: Callable[[], tuple[int, int]] | None = None) -> None:
        self._out = out
        self._size = size or (lambda: _size_of(out))
        self._column = 0
        self._extent = 0  # columns of the cursor's row that hold output
        self._wrapped = False
        self._styled = False
        self._live = ""
        self._shown: tuple[str, int, int] | None = None

    @property
    def columns(self) -> int:
        """How many cells a line of ours has; the last one stays free, or some terminals would wrap."""
        return max(self._size()[0] - 1, 1)

    def write(self, text: str) -> None:
        """Write a text that `SafeOutput` or a renderer made, above the live line."""
        if text:
            self._out.write((self._erase() + self._placed(text) + self._draw()).encode(errors="replace"))

    def write_line(self, text: str) -> None:
        """Write a line of our own; an unfinished line of output ends before it, and so do its colours."""
        self.write(f"{self.end_of_line()}{text}\n")

    def end_of_line(self) -> str:
        """Return what ends an unfinished line, and its colours."""
        reset = _RESET if self._styled else ""
        return f"{reset}\n" if self._column or self._extent or self._wrapped else reset

    def live(self, text: str) -> None:
        """Show another live line, which has to fit into `columns`; an empty one removes it."""
        self._live = text
        if self._shown != self._wanted():
            self._out.write((self._erase() + self._draw()).encode(errors="replace"))

    def abandon(self) -> None:
        """Remove the live line in a signal handler, right before the process ends."""
        end = f"{_RESET}\x1b[J" if self._column or self._extent else f"\r{_RESET}\x1b[J"
        os.write(self._out.fileno(), (end + ("\n" if self._column else "")).encode())

    def _wanted(self) -> tuple[str, int, int] | None:
        columns, rows = self._size()
        return (self._live, columns, rows) if self._live and rows > 1 else None

    def _erase(self) -> str:
        if self._shown is None:
            return ""
        self._shown = None
        if not self._extent:
            return f"\r\x1b7{_RESET}\x1b[J\x1b8"  # \r: Ctrl-C echoes as ^C
        if self._column >= self._extent:
            return f"\x1b7{_RESET}\x1b[J\x1b8"
        return f"\x1b7{_RESET}\x1b[B\r\x1b[J\x1b8"  # a carriage return came last

    def _draw(self) -> str:
        wanted = self._wanted()
        if wanted is None:
            return ""
        self._shown = wanted
        ahead = ""
        columns = wanted[1]
        if self._column > columns:  # it has become narrower, and most terminals have wrapped the row
            self._column = self._extent = (self._column - 1) % columns + 1
        if self._column >= columns:
            # The cursor hangs behind the last column, and no sequence brings it back there: the next
            # character goes to the next row, so that is where it waits.
            ahead = "\r\n"
            self._column = self._extent = 0
            self._wrapped = True
        if not self._extent:
            return f"{ahead}\r\x1b7{_RESET}{self._live}\x1b8"
        # IND makes a row below, scrolling if it has to, and CUU comes back to the same column.
        return f"\x1bD\x1b[A\x1b7{_RESET}\x1b[B\r{self._live}\x1b8"

    def _placed(self, text: str) -> str:
        """Follow the cursor through a text; returns the text as it has to be written from where it is."""
        columns = max(self._size()[0], 1)
        if self._wrapped:
            text = self._unwrapped(text)
        *lines, last = text.split("\n")
        if lines:
            self._column = self._extent = 0
        sequences = _SEQUENCE.findall(text)
        if sequences:
            self._styled = not re.fullmatch(r"\x1b\[[0;:]*m", sequences[-1])
            last = _SEQUENCE.sub("", last)
        for number, piece in enumerate(last.split("\r")):
            if number:
                self._column = 0
            self._advance(piece, columns)
        return text

    def _unwrapped(self, text: str) -> str:
        """Correct a text for a cursor that has gone to the next row before its time."""
        sequences, returns, newline = re.match(rf"((?:{_SGR})*)(\r*)(\n?)", text).groups()  # type: ignore[union-attr]
        rest = text[len(sequences) + len(returns) + len(newline) :]
        self._wrapped = not (returns or newline or rest)
        if newline:
            return f"{sequences}{rest}"
        if returns:
            self._extent = max(self._size()[0], 1)
            return f"{sequences}\x1b[A\r{rest}"
        return text

    def _advance(self, piece: str, columns: int) -> None:
        for number, part in enumerate(piece.split("\t")):
            if number:
                self._column = min((self._column // _TAB + 1) * _TAB, columns - 1)
            width = cells(part)
            if self._column + width > columns:
                self._column = self._column_after(part, columns)
                self._extent = self._column
            else:
                self._column += width
            self._extent = max(self._extent, self._column)

    def _column_after(self, part: str, columns: int) -> int:
        column = self._column
        if part.isascii():
            return (column + len(part) - 1) % columns + 1
        for character in part:
            width = cells(character)
            column = width if column + width > columns else column + width
        return column


def _size_of(out: BinaryIO) -> tuple[int, int]:
    try:
        columns, rows = os.get_terminal_size(out.fileno())
    except OSError:  # it is not one, or it has gone
        columns, rows = 0, 0
    return columns or 80, rows or 24
