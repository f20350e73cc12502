"""The page of the driver says what the code does."""

from __future__ import annotations

import runpy

from firebuild_bootstrap.machine.qemu.settings import QemuSettings
from support import REPO

PAGE = (REPO / "docs/qemu.md").read_text()


def test_the_table_of_settings_is_that_of_the_model() -> None:
    table = runpy.run_path(str(REPO / "scripts/option-tables"))["table"]
    assert f"\n\n{table(QemuSettings)}\n\n" in PAGE
