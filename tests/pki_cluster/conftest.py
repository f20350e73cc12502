from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from baoserver import DevServer
from pki_cluster.proxy import Proxy
from pki_cluster.scene import Scene, provider_threads, sockets


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Whatever happened to a provider, its threads and connections end with it."""
    before = sockets()
    yield
    end = time.monotonic() + 10
    while (provider_threads() or sockets() - before) and time.monotonic() < end:
        time.sleep(0.05)
    assert not provider_threads()
    assert not sockets() - before


@pytest.fixture
def scene(dev_server: DevServer, unique: str) -> Scene:
    """A CA in the shared server."""
    return Scene.made(dev_server.api, unique)


@pytest.fixture
def proxy(dev_server: DevServer) -> Iterator[Proxy]:
    """A proxy in front of the shared server."""
    with Proxy(dev_server.port) as proxy:
        yield proxy
