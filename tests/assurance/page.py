"""What programs write of docs/assurance.md: blocks between two comments, with a line for each name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/assurance.md"

_NAME = re.compile(r"(?:\| |- \*\*)([a-z0-9-]+)\b")


def lines_of(text: str, block: str) -> dict[str, str]:
    """Return the lines of a block of the page, which is a table or a list, by their names.

    Raises:
        LookupError: the page has no such block.
    """
    return _split(text, block)[1]


def replaced(text: str, block: str, lines: Mapping[str, str], order: Sequence[str]) -> str:
    """Return the page with lines put into a block of it; those of other names stay.

    Args:
        lines: by name, without their ends.
        order: the names that there are; lines of others go.
    """
    before, former, after = _split(text, block)
    every = {**former, **lines}
    return before + "".join(f"{every[name]}\n" for name in order if name in every) + after


def _split(text: str, block: str) -> tuple[str, dict[str, str], str]:
    """Return what is before the lines of a block, these by their names, and what is after them."""
    parts = re.fullmatch(
        rf"(.*<!-- {block} -->\n(?:\|[^\n]*\n\|[-|]+\n)?)(.*)(<!-- end of {block} -->\n.*)", text, re.DOTALL
    )
    if parts is None:
        raise LookupError(f"the page has no block {block}")
    lines = {match[1]: line for line in parts[2].splitlines() if (match := _NAME.match(line))}
    return parts[1], lines, parts[3]


def with_machine(text: str, machine: str) -> str:
    """Return the page with the machine that the last trial ran on."""
    return re.sub(
        r"(?m)^The last of them ran on .*\.$", lambda _: f"The last of them ran on {machine}.", text
    )


def trial_line(name: str, what: str, tried: int, faults: int, seconds: float, date: str) -> str:
    """Write the row of a trial."""
    return f"| {name} | {what} | {tried:,} | {faults or 'none'} | {seconds / 60:.0f} | {date} |"


def kinds_line(name: str, counts: Mapping[str, int]) -> str:
    """Write how often a trial tried each kind of thing."""
    return f"- **{name}**: {', '.join(f'{count:,} {kind}' for kind, count in sorted(counts.items()))}"


def fuzzed_line(
    former: str | None, name: str, executions: int, seconds: float, edges: int, fault: str
) -> str:
    """Write the row of a fuzzer's target: what it had before, and this run.

    Args:
        former: the row so far.
        seconds: of a processor.
        edges: of this project's code; 0 where all that reads is a library.
        fault: what was found, in a few words; empty for nothing.
    """
    before, hours, most, found = 0, 0.0, 0, ""
    if former is not None:
        cells = [cell.strip() for cell in former.strip("|").split("|")]
        before, hours = int(cells[1].replace(",", "")), float(cells[2])
        most, found = int(cells[3].replace("-", "0")), cells[4].removeprefix("none")
    faults = "; ".join(words for words in (found, fault) if words)
    shown = max(most, edges) or "-"
    return (
        f"| {name} | {before + executions:,} | {hours + seconds / 3600:.2f} | {shown} | {faults or 'none'} |"
    )
