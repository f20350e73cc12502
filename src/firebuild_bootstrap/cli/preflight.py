"""How a preflight's report looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.screen import INDENT, beside, beside_head, indented, styled
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from firebuild_pki.preflighting import PreflightReport, PreflightRow

_WORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ok": ("ok", {"fg": "green"}),
    "warning": ("warn", {"fg": "yellow"}),
    "fatal": ("FAIL", {"fg": "red", "bold": True}),
    "skipped": ("skip", {"dim": True}),
}
_VERDICTS = {
    "ready": "ready: a build gets what it needs",
    "settings": "not ready: the configuration is wrong",
    "authority": "not ready: a build would get no usable certificates",
}
_SLOW_SECONDS = 0.5
_LEVEL_WIDTH = 6
_ABOUT_WIDTH = 15


def print_row(row: PreflightRow) -> None:
    """Print a row, and its hint below it."""
    word, style = _WORDS[row.level.value]
    head = f"{styled(word, **style)}{' ' * (_LEVEL_WIDTH - len(word))}{one_line(row.about)} "
    head_width = max(_LEVEL_WIDTH + _ABOUT_WIDTH, len(click.unstyle(head)))
    slow = row.seconds is not None and row.seconds >= _SLOW_SECONDS
    lines = beside_head(head, head_width, f"{row.message} ({row.seconds:.1f} s)" if slow else row.message)
    if row.hint:
        lines += indented(f"hint: {row.hint}", (head_width if beside() else INDENT) + 2)
    click.echo("\n".join(lines))


def print_verdict(report: PreflightReport) -> None:
    """Print what all rows come to."""
    warnings = sum(row.level.value == "warning" for row in report.rows)
    more = f"{warnings} warning{'s' if warnings > 1 else ''}, " if warnings else ""
    style = {"bold": True, "fg": "green" if report.ready else "red"}
    click.echo(f"\n{styled(_VERDICTS[report.verdict.value], **style)} ({more}{report.seconds:.1f} s)")
