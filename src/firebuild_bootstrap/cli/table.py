"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Sequence

import click

from firebuild_bootstrap.terminal import cells
from firebuild_pki.display import one_line


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns, two spaces apart, as wide as they need."""
    lines = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cells, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell + " " * (width - cells(cell)) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())
