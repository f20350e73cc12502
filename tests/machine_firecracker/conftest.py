from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from firebuild_bootstrap.image.bases import Base, BaseStore
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import IdMap, Sandbox, detect


@pytest.fixture(scope="session")
def idmap() -> IdMap:
    return detect()


@pytest.fixture(scope="session")
def host_base(tmp_path_factory: pytest.TempPathFactory, idmap: IdMap) -> Base:
    store = BaseStore(tmp_path_factory.mktemp("bases"), partial(Trees, Sandbox(idmap)))
    return store.create_from_host("host")


@pytest.fixture
def workspace(tmp_path: Path, idmap: IdMap) -> Iterator[Workspace]:
    with Workspace(tmp_path / "home", "b1", idmap) as made:
        yield made
