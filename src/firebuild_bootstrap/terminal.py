"""Output for a terminal: text that can't control it, lines that fit, and a block at the bottom.

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
# What a step writes to most of the time, and needs no look at its characters.
_HARMLESS: Final = re.compile(r"[ -~\n\r\t]*")


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


def uncoloured(text: str) -> str:
    """Leave SGR sequences out of a text."""
    return _SEQUENCE.sub("", text)


def visible_end(text: str, lines: int) -> list[str]:
    """Return the last lines of a text that `SafeOutput` made, as they look: without colours, printable.

    Of a line that was written over after a carriage return, as those of progress bars, the last words count.
    """
    found = text.removesuffix("\n").rsplit("\n", lines)[-lines:]
    ends = (uncoloured(line).rstrip("\r").rpartition("\r")[2] for line in found)
    return [end.expandtabs() for end in ends]


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
        if _HARMLESS.fullmatch(text):
            self._unfinished = ""
            return text
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
    """A terminal with a block at the bottom that is drawn again and again, below lines that stay.

    The cursor is never hidden and rests where the block begins. So whatever happens to this process, or to
    the size of the terminal, erasing what is behind it removes the block and nothing else: terminals that
    rewrap lines when they become narrower keep the cursor at its character.

    Args:
        out: the terminal.
        size: returns its columns and rows; asked at each drawing, for both may change at any time.
    """

    def __init__(self, out: BinaryIO, size: Callable[[], tuple[int, int]] | None = None) -> None:
        self._out = out
        self._size = size or (lambda: _size_of(out))
        self._shown: tuple[list[str], tuple[int, int]] | None = None

    @property
    def room(self) -> tuple[int, int]:
        """How many cells a row of the block has, and how many rows it can have.

        The last column stays free, or some terminals would wrap, and so does a row.
        """
        columns, rows = self._size()
        return max(columns - 1, 1), rows - 1

    def write(self, text: str) -> None:
        """Write lines that stay, instead of the block."""
        if text:
            self._put(f"{self._erased()}{text}")

    def show(self, rows: list[str]) -> None:
        """Show another block, of rows that fit into `room`."""
        wanted = (rows, self._size()) if rows else None
        if wanted == self._shown:
            return
        if not rows:
            self._put(self._erased())
            return
        # What is written over does not flicker; what is left of the block before is behind it.
        up = f"\x1b[{len(rows) - 1}A" if len(rows) > 1 else ""
        self._put("\r" + "\x1b[K\n".join(rows) + f"\x1b[J{up}\r")
        self._shown = wanted

    def abandon(self) -> None:
        """Remove the block in a signal handler, right before the process ends."""
        os.write(self._out.fileno(), f"\r{_RESET}\x1b[J".encode())

    def _erased(self) -> str:
        shown, self._shown = self._shown, None
        return "\r\x1b[J" if shown else ""  # \r: Ctrl-C echoes as ^C

    def _put(self, text: str) -> None:
        # Where keys pass to a machine, the driver of the terminal does not return the carriage.
        self._out.write(text.replace("\n", "\r\n").encode(errors="replace"))


def _size_of(out: BinaryIO) -> tuple[int, int]:
    try:
        columns, rows = os.get_terminal_size(out.fileno())
    except OSError:  # it is not one, or it has gone
        columns, rows = 0, 0
    return columns or 80, rows or 24
