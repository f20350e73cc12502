"""Taking steps one after the other; what needs a failed one is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from firebuild_pki.errors import CAError, IdentityError, SettingsError
from firebuild_pki.preflighting.report import PreflightRow, RowLevel, Verdict
from firebuild_pki.preflighting.rows import rows_of, skipped


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
