from __future__ import annotations

import pytest

from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.sandbox import Sandbox, detect
from layers.trees import make_tar, rich_tree

__all__ = ["make_tar", "rich_tree", "trees"]


@pytest.fixture(scope="session")
def trees() -> Trees:
    return Trees(Sandbox(detect()))
