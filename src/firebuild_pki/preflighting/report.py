"""What a preflight found out, row by row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from enum import StrEnum
from typing import Any

from firebuild_pki.errors import CAError, IdentityError, SettingsError
from firebuild_pki.provider import Note, NoteLevel
from firebuild_pki.values import dataclass


class RowLevel(StrEnum):
    """How a thing that was looked at turned out."""

    OK = "ok"
    WARNING = "warning"
    """A build works all the same."""
    FATAL = "fatal"
    """A build would end here."""
    SKIPPED = "skipped"
    """Not looked at: something that it needs failed, or does not apply."""


_LEVELS = {
    NoteLevel.OK: RowLevel.OK,
    NoteLevel.WARNING: RowLevel.WARNING,
    NoteLevel.FATAL: RowLevel.FATAL,
}


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
        about: its subject, in one or two words.
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


def ok(about: str, message: str) -> PreflightRow:
    """Make a row of something that is right."""
    return PreflightRow(about, RowLevel.OK, message)


def warning(about: str, message: str, hint: str | None = None) -> PreflightRow:
    """Make a row of a warning."""
    return PreflightRow(about, RowLevel.WARNING, message, hint)


def skipped(about: str, message: str) -> PreflightRow:
    """Make a row of something that was not looked at."""
    return PreflightRow(about, RowLevel.SKIPPED, message)


def row_of(about: str, note: Note) -> PreflightRow:
    """Make a row of a provider's note; `about` is for notes that do not say."""
    message = str(replace(note, hint=None))
    return PreflightRow(note.about or about, _LEVELS[note.level], message, note.hint)


def rows_of(about: str, error: CAError) -> list[PreflightRow]:
    """Make rows of an error: one for each problem of settings, one for anything else."""
    if isinstance(error, SettingsError):
        return [
            PreflightRow(about, RowLevel.FATAL, str(replace(problem, hint=None)), problem.hint)
            for problem in error.problems
        ]
    hint = error.hint or ("it may work later: try again" if error.retryable else None)
    return [PreflightRow(about, RowLevel.FATAL, error.message, hint)]


class Steps:
    """The rows so far.

    Args:
        check: called before each step; what it raises ends the preflight.
        on_row: told about each row as soon as it is there.
    """

    def __init__(self, check: Callable[[], None], on_row: Callable[[PreflightRow], None]) -> None:
        self._check = check
        self._on_row = on_row
        self._began = time.monotonic()
        self._passed: set[str] = set()
        self.rows: list[PreflightRow] = []
        self.verdict = Verdict.READY

    @property
    def seconds(self) -> float:
        """Time since the first step."""
        return time.monotonic() - self._began

    def take(
        self,
        about: str,
        look: Callable[[], Iterable[PreflightRow]],
        *,
        needs: Iterable[str] = (),
    ) -> None:
        """Take a step, unless one that it needs has not passed.

        Args:
            about: name of the step, and of its row if it fails.
            look: returns the rows, at least one; a `CAError` becomes one.
            needs: names of earlier steps.
        """
        self._check()
        missing = [name for name in needs if name not in self._passed]
        if missing:
            self.add(about, skipped(about, f"needs: {', '.join(missing)}"))
            return
        began, blame = time.monotonic(), Verdict.AUTHORITY
        try:
            rows = list(look())
        except CAError as error:
            rows = rows_of(about, error)
            if isinstance(error, SettingsError | IdentityError):
                blame = Verdict.SETTINGS
        rows[0] = replace(rows[0], seconds=time.monotonic() - began)
        if not any(row.level is RowLevel.FATAL for row in rows):
            self._passed.add(about)
        elif self.verdict is Verdict.READY:
            self.verdict = blame
        for row in rows:
            self.add(about, row)

    def add(self, step: str, row: PreflightRow) -> None:
        """Note a row of a step."""
        self.rows.append(replace(row, step=step))
        self._on_row(self.rows[-1])
