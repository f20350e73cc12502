from __future__ import annotations

import pytest

from firebuild_bootstrap.sandbox import IdMap, Runtime, Sandbox, detect, find_runtime


@pytest.fixture(scope="session")
def idmap() -> IdMap:
    return detect()


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return find_runtime()


@pytest.fixture
def sandbox(idmap: IdMap) -> Sandbox:
    return Sandbox(idmap)
