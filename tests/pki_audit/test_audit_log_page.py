"""docs/audit-log.md describes the lines that are written."""

from __future__ import annotations

import json
import re
from pathlib import Path

from firebuild_pki import CAEvent, EventKind
from firebuild_pki.observers.audit_log import MAX_REASON, line_of
from pki.tools import NOW

PAGE = (Path(__file__).parents[2] / "docs" / "audit-log.md").read_text(encoding="utf-8")
FIELDS = list(json.loads(line_of(CAEvent(EventKind.CLOSED, NOW, "embedded", "b"))))


def test_the_table_lists_every_field_in_order() -> None:
    table = PAGE.split("## Format")[1].split("## The file")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == FIELDS


def test_the_example_lines_have_every_field() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    found = [json.loads(line) for line in example.splitlines()]
    assert [list(one) for one in found] == [FIELDS] * 3
    assert [one["kind"] for one in found] == ["issued", "refused", "closed"]


def test_every_kind_and_limit_is_named() -> None:
    assert all(f"`{kind}`" in PAGE for kind in EventKind)
    assert f"{MAX_REASON} characters" in PAGE
