"""End-to-end tests drive the installed commands, as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import Firebuild


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that already holds the base `host`."""
    home = tmp_path_factory.mktemp("home")
    Firebuild(home)("base", "from-host", "host")
    return home


@pytest.fixture
def firebuild(shared_home: Path) -> Firebuild:
    return Firebuild(shared_home)
