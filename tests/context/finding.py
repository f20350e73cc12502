"""What the tests of the build context share: files to find, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from firebuild_bootstrap.context import ContextResource
from firebuild_bootstrap.errors import InputError, Location

Find = Callable[..., ContextResource]
HERE = Location("Dockerfile", 5)


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def paths(resource: ContextResource) -> list[str]:
    return [entry.path for entry in resource.entries()]


def content(resource: ContextResource) -> bytes:
    (entry,) = resource.entries()
    assert entry.open is not None
    with entry.open() as file:
        return file.read()


def error_of(find: Find, *sources: str) -> InputError:
    with pytest.raises(InputError) as caught:
        find(*sources)
    assert caught.value.location == HERE
    return caught.value
