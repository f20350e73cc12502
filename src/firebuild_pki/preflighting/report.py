"""What a preflight found out, row by row."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class RowLevel(StrEnum):
    """How a thing that was looked at turned out."""

    OK = "ok"
    WARNING = "warning"
    """A build works all the same."""
    FATAL = "fatal"
    """A build would end here."""
    SKIPPED = "skipped"
    """Not looked at: something that it needs failed, or does not apply."""


class Verdict(StrEnum):
    """What a report comes to."""

    READY = "ready"
    SETTINGS = "settings"
    """The configuration is wrong."""
    AUTHORITY = "authority"
    """The configuration is readable, but no build gets usable certificates."""


@dataclass(frozen=True, slots=True)
class PreflightRow:
    """One thing that was looked at.

    Args:
        about: what, in a word or two.
        level: how it turned out.
        message: what was found.
        hint: what to do about it.
        seconds: how long it took; None where nothing was waited for.
        step: which of the steps it belongs to; unlike `about`, these names stay.
    """

    about: str
    level: RowLevel
    message: str
    hint: str | None = None
    seconds: float | None = None
    step: str = ""


@dataclass(frozen=True, slots=True)
class PreflightReport:
    """All rows of a preflight.

    Args:
        provider: name of the provider; empty if the configuration does not tell.
        build_id: the id of the build that was pretended; empty if it did not come to that.
        verdict: what it comes to.
        rows: what was looked at, in order.
        seconds: how long all of it took.
    """

    provider: str
    build_id: str
    verdict: Verdict
    rows: tuple[PreflightRow, ...]
    seconds: float

    @property
    def ready(self) -> bool:
        """Whether a build would get what it needs."""
        return self.verdict is Verdict.READY

    def count(self, level: RowLevel) -> int:
        """Count the rows of a level."""
        return sum(row.level is level for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            "provider": self.provider,
            "build_id": self.build_id,
            "verdict": self.verdict.value,
            "warnings": self.count(RowLevel.WARNING),
            "seconds": round(self.seconds, 3),
            "rows": [_row_to_json(row) for row in self.rows],
        }


def _row_to_json(row: PreflightRow) -> dict[str, Any]:
    seconds = None if row.seconds is None else round(row.seconds, 3)
    return {**asdict(row), "level": row.level.value, "seconds": seconds}
