"""What the long trials put into their page, and what of it they leave as it is."""

from __future__ import annotations

import pytest

from assurance.page import PAGE, fuzzed_line, kinds_line, lines_of, replaced, trial_line, with_machine
from assurance.trials import load
from fuzz.targets import TARGETS

TEXT = """before

<!-- trials -->
| trial | what |
|---|---|
| second | of before |
| gone | which there is no more |
<!-- end of trials -->

The last of them ran on an abacus.
"""


def test_a_line_is_put_in_its_place_and_the_others_stay() -> None:
    text = replaced(TEXT, "trials", {"first": "| first | now |"}, ["first", "second", "third"])
    assert text == TEXT.replace("| second", "| first | now |\n| second").replace(
        "| gone | which there is no more |\n", ""
    )
    again = replaced(text, "trials", {"first": r"| first | \1 later |"}, ["first", "second"])
    assert lines_of(again, "trials")["first"] == r"| first | \1 later |"


def test_a_page_without_the_block_is_left_alone() -> None:
    with pytest.raises(LookupError, match="no block kinds"):
        replaced(TEXT, "kinds", {}, [])


def test_the_machine_is_named() -> None:
    assert with_machine(TEXT, r"\d cores").endswith("\nThe last of them ran on \\d cores.\n")


def test_a_trial_has_a_row_and_what_it_tried_a_line_of_its_own() -> None:
    row = trial_line("kills", "builds, killed", 1234, 0, 299.0, "2026-11-30")
    assert row == "| kills | builds, killed | 1,234 | none | 5 | 2026-11-30 |"
    assert trial_line("kills", "builds, killed", 1, 2, 0, "2026-11-30").endswith("| 1 | 2 | 0 | 2026-11-30 |")
    assert kinds_line("kills", {"pull": 1000, "build": 2}) == "- **kills**: 2 build, 1,000 pull"


def test_what_a_target_had_is_added_to() -> None:
    first = fuzzed_line(None, "layer", 1000, 1800, 90, "")
    assert first == "| layer | 1,000 | 0.50 | 90 | none |"
    second = fuzzed_line(first, "layer", 500, 360, 80, "a fault, 2026-11-30")
    assert second == "| layer | 1,500 | 0.60 | 90 | a fault, 2026-11-30 |"
    assert fuzzed_line(second, "layer", 1, 0, 0, "another").endswith("| a fault, 2026-11-30; another |")
    assert fuzzed_line(None, "library", 5, 0, 0, "") == "| library | 5 | 0.00 | - | none |"


def test_the_page_has_all_blocks_with_lines_of_what_there_is() -> None:
    text = PAGE.read_text()
    assert set(lines_of(text, "trials")) == set(lines_of(text, "kinds")) <= set(load())
    assert set(lines_of(text, "fuzzing")) == set(TARGETS)
    for block, order in (("trials", list(load())), ("kinds", list(load())), ("fuzzing", list(TARGETS))):
        assert sorted(replaced(text, block, {}, order).splitlines()) == sorted(text.splitlines())
