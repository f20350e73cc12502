"""Two builds at once on one machine: neither guest can reach the other's server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from firebuild_bootstrap.events import Event, PeerRefused
from firebuild_bootstrap.mmds import DataStore, MetadataDocument, MetadataEmulator, bootstrap_block
from firebuild_bootstrap.service import BootstrapServer, Outcome
from firebuild_pki import Authority, TLSMaterial, open_authority
from support import ending_of


class Build:
    """A running server and the material of its guest."""

    def __init__(self, cleanup: ExitStack, authority: Authority) -> None:
        self.events: list[Event] = []
        self.guest = authority.issue_guest()
        self.server = BootstrapServer(
            commands=[],
            resources={},
            server_material=authority.issue_server(),
            guest_material=self.guest,
            events=self.events.append,
        )
        self.host_port = self.server.start()
        cleanup.callback(self.server.stop)

    @property
    def refused(self) -> list[PeerRefused]:
        return [event for event in self.events if isinstance(event, PeerRefused)]


@pytest.fixture
def builds() -> Iterator[tuple[Build, Build]]:
    with ExitStack() as cleanup:
        one, two = (
            Build(cleanup, cleanup.enter_context(open_authority(build_id=name))) for name in ("one", "two")
        )
        yield one, two


@pytest.fixture
def vminit(tmp_path: Path) -> Callable[[TLSMaterial, str], subprocess.CompletedProcess[str]]:
    """Runs a real guest with the credentials of one build and the address of any."""

    def run(guest: TLSMaterial, host_port: str) -> subprocess.CompletedProcess[str]:
        store = DataStore()
        store.put(MetadataDocument(bootstrap=bootstrap_block(guest, host_port=host_port)).to_json())
        emulator = MetadataEmulator(store, tmp_path / "mmds" / "socket")
        address = emulator.start()
        try:
            options = ["--root", str(tmp_path), "--mmds", address, "--connect-timeout", "2"]
            command = [sys.executable, "-m", "firebuild_bootstrap.guest.main", "bootstrap", *options]
            return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        finally:
            emulator.stop()

    return run


def ending(build: Build) -> str | None:
    outcome: Outcome | None = build.server.wait(0.5)
    return ending_of(outcome) if outcome else None


def test_each_guest_reaches_its_own_server(
    builds: tuple[Build, Build],
    vminit: Callable[[TLSMaterial, str], subprocess.CompletedProcess[str]],
) -> None:
    for build in builds:
        done = vminit(build.guest, build.host_port)
        assert done.returncode == 0, done.stderr
        assert ending(build) == "success"
        assert build.refused == []


def test_a_guest_refuses_the_server_of_the_other_build(
    builds: tuple[Build, Build],
    vminit: Callable[[TLSMaterial, str], subprocess.CompletedProcess[str]],
) -> None:
    one, two = builds
    done = vminit(one.guest, two.host_port)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert ending(one) is None
    assert ending(two) is None
    assert two.refused
    assert one.refused == []
