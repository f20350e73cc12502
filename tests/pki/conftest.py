"""Fixtures of the CA framework's tests."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution on sys.path the way pip would: a module and a dist-info directory."""
    modules: list[str] = []

    def write(
        distribution: str,
        code: str,
        *,
        name: str,
        module: str,
        group: str = "firebuild_pki.providers",
    ) -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        sys.modules.pop(module, None)
        modules.append(module)
        return site

    yield write
    for module in modules:  # another test's module may have the same name
        sys.modules.pop(module, None)
