"""A short form of each long test."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from assurance import authorities, escapes
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
    effort = Effort(tmp_path, seconds=2)  # the same seed each time: what is found elsewhere gets a test
    TRIALS[name].run(effort)
    assert effort.counts
    assert effort.faults == []


@pytest.mark.needs("busybox", "userns", "step-ca")
def test_a_build_whose_step_ca_is_killed_says_so(tmp_path: Path) -> None:
    effort = Effort(tmp_path, seconds=0)
    with ExitStack() as cleanup:
        place = authorities.place_of(effort)
        ca = authorities.step_ca(cleanup, place, effort.chance)
        kill = next(authorities.Trouble(*each) for each in ca.during if each[0] == "kill")
        kill.do()  # before the build can have asked
        authorities.in_trouble(effort, place, "step-ca", ca, kill)
    assert effort.counts == {"step-ca, kill: failed in words": 1, "step-ca, as it should be": 1}


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


@pytest.mark.needs("tester")
def test_escapes_of_other_users_are_left_out_where_those_may_not_execute_firebuild(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir(mode=0o700)
    (tmp_path / "bin/firebuild").symlink_to("/bin/true")
    monkeypatch.setattr(escapes, "BIN", tmp_path / "bin")
    assert not [kind for kind in escapes.kinds(with_vm=False).values() if kind.user]
