"""A directory to make a build context of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.context import BuildContext, ContextResource, LocalSource
from firebuild_bootstrap.errors import Location

HERE = Location("Dockerfile", 5)
Find = Callable[..., ContextResource]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The build context, with a secret beside it that no path may reach."""
    (tmp_path / "secret").write_text("outside")
    directory = tmp_path / "context"
    directory.mkdir()
    return directory


@pytest.fixture
def find(root: Path) -> Iterator[Find]:
    """Find sources in the build context as it is now, for the instruction at `HERE`."""
    contexts: list[BuildContext] = []

    def resource(*sources: str, unpack: bool = False, keep_owner: bool = True) -> ContextResource:
        contexts.append(BuildContext(root))
        return contexts[-1].resource(
            [LocalSource(text) for text in sources], location=HERE, unpack=unpack, keep_owner=keep_owner
        )

    yield resource
    for context in contexts:
        context.close()
