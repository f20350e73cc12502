"""Text on a terminal: its width, its colours, tables, nothing that could move its cursor."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click

from firebuild_bootstrap.terminal import cells, colours_wanted, fit
from firebuild_pki.display import one_line

MAX_WIDTH = 100
INDENT = 4
"""Indent of what does not fit beside its head."""

_NARROW = 60
_LEVEL_WIDTH = 6


def width() -> int:
    """Columns to use: those of the terminal, 100 at most and in pipes."""
    return min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns or MAX_WIDTH, MAX_WIDTH)


def coloured() -> bool:
    """Whether to use colours: on a terminal, if it is to be coloured."""
    return sys.stdout.isatty() and colours_wanted(os.environ)


def styled(text: str, **style: bool | str) -> str:
    """Style text, if there are colours."""
    return click.style(text, **style) if coloured() else text  # type: ignore[arg-type]


def beside() -> bool:
    """Whether there is room for a text beside its head."""
    return width() >= _NARROW


def indented(text: str, indent: int) -> list[str]:
    """Wrap a text into lines with an indent; words are never broken, so that names can be copied."""
    room = max(width() - indent, 20)
    lines = textwrap.wrap(one_line(text), room, break_long_words=False, break_on_hyphens=False)
    return [" " * indent + line for line in lines]


def beside_head(head: str, head_width: int, text: str) -> list[str]:
    """Put a text beside its head, or below it where the terminal is narrow.

    Args:
        head: what the text is about; may be styled.
        head_width: columns for the head, including the space behind it.
        text: the text.
    """
    if not beside():
        return [head.rstrip(), *indented(text, INDENT)]
    lines = indented(text, head_width) or [""]
    padding = " " * (head_width - len(click.unstyle(head)))
    return [(head + padding + lines[0].lstrip()).rstrip(), *lines[1:]]


def print_checked(
    level: tuple[str, dict[str, Any]], about: str, room: int, message: str, hint: str | None
) -> None:
    """Print a row of what was looked at, and its hint below it.

    Args:
        level: the word that begins the row, of five letters at most, and its style.
        about: what was looked at.
        room: columns for that.
        message: what was found.
        hint: what to do about it.
    """
    word, style = level
    head = f"{styled(word, **style)}{' ' * (_LEVEL_WIDTH - len(word))}{one_line(about)} "
    head_width = max(_LEVEL_WIDTH + room, len(click.unstyle(head)))
    lines = beside_head(head, head_width, message)
    if hint:
        lines += indented(f"hint: {hint}", (head_width if beside() else INDENT) + 2)
    click.echo("\n".join(lines))


def moment(text: str) -> str:
    """Write a time (RFC 3339) as tables do, `2026-11-28 20:04` in UTC; what is not one as it is, cut.

    Images from outside tell times with any number of digits, in any zone, or something else.
    """
    try:
        return datetime.fromisoformat(text).astimezone(UTC).isoformat(" ")[:16]
    except (ValueError, OverflowError):
        return fit(one_line(text), 16)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns, two spaces apart, as wide as they need."""
    lines = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cells, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cells(cell)) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())
