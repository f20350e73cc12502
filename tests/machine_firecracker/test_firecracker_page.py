"""docs/firecracker.md is about the settings that there are."""

from __future__ import annotations

import re

from pydantic import BaseModel

from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from support import REPO

PAGE = (REPO / "docs/firecracker.md").read_text()


def names(model: type[BaseModel], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= names(kind, f"{prefix}{name}.")
        else:
            found.add(f"{prefix}{name}")
    return found


def test_the_table_lists_every_setting_and_no_other() -> None:
    table = PAGE.partition("\n## Settings\n")[2].partition("\n## ")[0]
    keys = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {key for cell in keys for key in re.findall(r"`([\w.]+)`", cell)} == names(FirecrackerSettings)


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https)([\w./-]+)\)", PAGE):
        assert (REPO / "docs" / target).exists(), target
