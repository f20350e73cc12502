"""A library user's build on real parts, with a store that holds the base `host`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.library import Library
from firebuild_bootstrap.home import Home


@pytest.fixture(scope="session")
def host_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that already holds the base `host`."""
    root = tmp_path_factory.mktemp("home")
    Home(root).bases.create_from_host("host")
    return root


@pytest.fixture
def library(tmp_path: Path, host_home: Path) -> Iterator[Library]:
    context = tmp_path / "context"
    context.mkdir()
    library = Library(context, Home(host_home))
    yield library
    assert library.leftovers() == []
    library.home.close()


@pytest.fixture
def own_library(tmp_path: Path) -> Iterator[Library]:
    """Builds in a store of their own, whose context holds the file `source`."""
    home = Home(tmp_path / "home")
    home.bases.create_from_host("host")
    context = tmp_path / "context"
    context.mkdir()
    (context / "source").write_text("one")
    library = Library(context, home)
    yield library
    assert library.leftovers() == []
    library.home.close()
