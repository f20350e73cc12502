"""Registries on loopback, with TLS from a CA of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.events import Event, Notice, Tasks
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.registry.transport import Surroundings
from registry.servers import CA, USER, Small, small_registry

LOGIN = {"username": USER, "password": {"env": "REGISTRY_PASSWORD"}}


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> CA:
    return CA.made(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def small(ca: CA) -> Iterator[Small]:
    with small_registry(ca.server_context()) as server:
        yield server


@pytest.fixture
def mirror(ca: CA) -> Iterator[Small]:
    with small_registry(ca.server_context()) as server:
        yield server


class Client:
    """Our side: registries with these settings, in an empty store, that remembers what it said and waited."""

    def __init__(self, home: Path, ca: CA, cleanup: ExitStack) -> None:
        self._ca = ca
        self._cleanup = cleanup
        self.blobs = cleanup.enter_context(closing(BlobStore(home)))
        self.environ: dict[str, str] = {"HOME": str(home)}
        self.events: list[Event] = []
        self.pauses: list[float] = []
        self.anchors: Callable[[], str] = str
        self.check: Callable[[], None] = lambda: None

    def registries(self, *hosts: str, special: dict[str, Any] | None = None, **settings: Any) -> Registries:
        """Return registries, with the CA for those hosts."""
        settings["hosts"] = {
            **{host: {"ca_file": str(self._ca.certificate)} for host in hosts},
            **{
                host: {"ca_file": str(self._ca.certificate), **more} for host, more in (special or {}).items()
            },
        }
        around = Surroundings(
            settings=RegistriesSettings.model_validate({"timeout": "5s", **settings}),
            environ=self.environ,
            anchors=self.anchors,
            check=self.check,
            pause=self.pauses.append,
        )
        return self._cleanup.enter_context(closing(Registries(around, Tasks(self.events.append))))

    @property
    def said(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]


@pytest.fixture
def client(tmp_path: Path, ca: CA) -> Iterator[Client]:
    with ExitStack() as cleanup:
        yield Client(tmp_path, ca, cleanup)
