"""docs/preflight.md says what there is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from firebuild_pki.preflighting import RowLevel, Verdict, preflight
from pki_preflight.test_preflight import BUILD_TIME, moody
from support import REPO

PAGE = (REPO / "docs/preflight.md").read_text("utf-8")


def first_column(heading: str) -> list[str]:
    section = PAGE.partition(f"### {heading}\n")[2].partition("\n#")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_step_is_on_the_page_in_order() -> None:
    report = preflight(moody("slams", ca={"observers": ["witness"]}), build_time=BUILD_TIME)
    assert first_column("The steps") == list(dict.fromkeys(row.step for row in report.rows))


def test_every_key_of_the_document_is_on_the_page() -> None:
    document: dict[str, Any] = preflight(moody(), build_time=BUILD_TIME).to_json()
    keys = [*document, *(f"rows[].{key}" for key in document["rows"][0])]
    assert sorted(first_column("The document")) == sorted(keys)


@pytest.mark.parametrize("word", [*RowLevel, *Verdict])
def test_every_word_of_the_document_is_on_the_page(word: str) -> None:
    assert f"`{word}`" in PAGE.partition("### The document\n")[2]


def test_the_example_works() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/preflight.md", "exec"), {})
