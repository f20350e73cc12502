"""Rows out of notes and errors."""

from __future__ import annotations

from dataclasses import replace

from firebuild_pki.errors import CAError, SettingsError
from firebuild_pki.preflighting.report import PreflightRow, RowLevel
from firebuild_pki.provider import Note, NoteLevel

_LEVELS = {
    NoteLevel.OK: RowLevel.OK,
    NoteLevel.WARNING: RowLevel.WARNING,
    NoteLevel.FATAL: RowLevel.FATAL,
}


def ok(about: str, message: str) -> PreflightRow:
    """Make a row of something that is right."""
    return PreflightRow(about, RowLevel.OK, message)


def warning(about: str, message: str, hint: str | None = None) -> PreflightRow:
    """Make a row of something that deserves a word."""
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
