"""A short form of each long test."""

from __future__ import annotations

from pathlib import Path

import pytest

from assurance.trials import Effort, load
from support import REPO

TRIALS = load()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.needs(*each.needs))
        for name, each in TRIALS.items()
        if each.in_suite
    ],
)
def test_a_short_form_finds_nothing(name: str, tmp_path: Path) -> None:
    effort = Effort(tmp_path, seconds=5)  # the same seed each time: what is found elsewhere gets a test
    TRIALS[name].run(effort)
    assert effort.counts
    assert effort.faults == []


def test_the_page_has_a_line_for_each_of_them() -> None:
    page = (REPO / "docs/assurance.md").read_text()
    tried = [each for each in TRIALS.values() if each.in_suite]
    assert [each.name for each in tried if f"| {each.name} | {each.what} |" not in page] == []


def test_what_a_trial_finds_is_kept_and_the_next_is_tried(tmp_path: Path) -> None:
    effort = Effort(tmp_path, seconds=0, seed=7)
    assert effort.goes_on()
    effort.attempt("division", lambda: 1 / 0)
    effort.attempt("division", lambda: 1 / 1)
    assert effort.counts == {"division": 2}
    assert not effort.goes_on()
    [fault] = effort.faults
    assert fault.startswith("division, number 1 of seed 7:\n")
    assert "ZeroDivisionError" in fault
