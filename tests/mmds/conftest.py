"""An emulator on a real socket, and what a guest says to it."""

from __future__ import annotations

import http.client
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.mmds import DataStore, MetadataEmulator

DOCUMENT = {
    "latest": {
        "meta-data": {
            "VMMID": "vm-1",
            "Env": {"B": "2", "A": "1"},
            "Count": 3,
            "List": ["zero", {"x": "y"}],
            "a/b": {"m~n": "escaped"},
        }
    }
}


class UnixConnection(http.client.HTTPConnection):
    """The standard HTTP client over a UNIX socket, like a guest in the local machine."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(self._path)


class Guest:
    """Asks over the given address."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.http: http.client.HTTPConnection = UnixConnection(address.removeprefix("unix:"))
        else:
            self.http = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)

    def ask(
        self, method: str, target: str, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str, http.client.HTTPResponse]:
        self.http.request(method, target, headers=dict(headers or {}))
        response = self.http.getresponse()
        return response.status, response.read().decode(), response

    def token(self, ttl: int = 60) -> str:
        status, body, _ = self.ask("PUT", "/latest/api/token", {"X-metadata-token-ttl-seconds": str(ttl)})
        assert status == 200
        return body


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fbm") as path:
        yield Path(path)


@pytest.fixture
def store() -> DataStore:
    store = DataStore()
    store.put(DOCUMENT)
    return store


@pytest.fixture
def serve(store: DataStore, folder: Path) -> Iterator[Callable[..., Guest]]:
    closing: list[Callable[[], None]] = []

    def start(where: Path | tuple[str, int] | None = None, **options: Any) -> Guest:
        emulator = MetadataEmulator(store, where or folder / "private" / "mmds.sock", **options)
        guest = Guest(emulator.start())
        closing.extend([guest.http.close, emulator.stop])
        return guest

    yield start
    for close in closing:
        close()
