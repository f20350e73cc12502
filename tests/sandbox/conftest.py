from __future__ import annotations

import pytest

from firebuild_bootstrap.sandbox import IdMap, Sandbox


@pytest.fixture
def sandbox(idmap: IdMap) -> Sandbox:
    return Sandbox(idmap)
