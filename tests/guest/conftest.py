"""A real mutual-TLS server, a real metadata service and a real sandbox for vminit to work in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.sandbox import Host, IdMap, Runtime
from firebuild_bootstrap.sandbox.idmap import single
from guest.build import Build, make_image
from guest.local import Local
from guest.pki import Pki, make_pki
from guest.server import BuildServer


@pytest.fixture(scope="session")
def pki() -> Pki:
    return make_pki()


@pytest.fixture(scope="session")
def single_idmap() -> IdMap:
    return single(Host.current(), "the test wants one id")


@pytest.fixture
def server(pki: Pki) -> Iterator[BuildServer]:
    server = BuildServer(pki).start()
    yield server
    server.stop()


@pytest.fixture
def build(pki: Pki, server: BuildServer, runtime: Runtime, idmap: IdMap, tmp_path: Path) -> Build:
    outside = tmp_path / "outside"
    outside.mkdir()
    return Build(pki, server, make_image(tmp_path / "image"), tmp_path, runtime, idmap, outside)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    (tmp_path / "root").mkdir()
    with Root(str(tmp_path / "root")) as root:
        yield root


@pytest.fixture
def local(pki: Pki, server: BuildServer, tmp_path: Path) -> Iterator[Local]:
    local = Local(pki, server, make_image(tmp_path / "image", busybox=False))
    yield local
    local.close()
