"""A real build with certificates of Vault, and a Vault that goes away while it runs."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from baoserver import DevServer
from pki_cluster.scene import Scene
from support import Firebuild

pytestmark = [pytest.mark.needs("bao", "userns"), pytest.mark.xdist_group("rootfs-vault")]

DOCKERFILE = "FROM host\nRUN sleep 2\nRUN echo done > /done\n"


@dataclass(frozen=True)
class Outcome:
    """How a build ended."""

    status: int
    events: list[dict[str, Any]]
    errors: str
    seconds: float


@pytest.fixture(scope="module")
def firebuild(tmp_path_factory: pytest.TempPathFactory) -> Firebuild:
    made = Firebuild(tmp_path_factory.mktemp("home"))
    made("base", "from-host", "host")
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DevServer]:
    """A server that the test may take down."""
    with DevServer(tmp_path) as server:
        yield server


def build(
    firebuild: Firebuild, directory: Path, section: dict[str, Any], scene: Scene, during: Callable[[], object]
) -> Outcome:
    """Build an image and do something during its first RUN."""
    (directory / "Dockerfile").write_text(DOCKERFILE)
    (directory / "firebuild.yaml").write_text(yaml.safe_dump({"ca": section}))
    command = ["rootfs", "--no-cache", "--context", directory, "--config", directory / "firebuild.yaml"]
    options = ["--tag", "t/vault:1", "--output", "tar", "--progress", "rawjson"]
    process = subprocess.Popen(
        [firebuild.program, *map(str, command), *options],
        env={**firebuild.environ, **scene.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    events = []
    end = start = time.monotonic()
    with process, watchdog(process):
        for line in process.stdout:
            events.append(json.loads(line))
            if events[-1]["event"] == "step-started" and events[-1]["step"] == 2:
                during()
        assert process.stderr is not None
        errors = process.stderr.read()
        status = process.wait()
        end = time.monotonic()
    return Outcome(status, events, errors, end - start)


class watchdog:  # noqa: N801 - reads as a function
    """Ends a process that takes too long."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._timer = threading.Timer(100, process.kill)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def test_the_certificates_of_a_build_come_from_vault(
    firebuild: Firebuild, server: DevServer, tmp_path: Path
) -> None:
    scene = Scene.made(server.api, "pki")
    section = scene.section(server.address, framework={"revoke_at_end": True})
    outcome = build(firebuild, tmp_path, section, scene, lambda: None)
    assert outcome.status == 0, outcome
    (started,) = (event for event in outcome.events if event["event"] == "build-started")
    assert started["ca_provider"] == "vault"
    assert len(server.api.call("LIST", "pki/certs/revoked")["data"]["keys"]) == 2
    assert outcome.errors == ""


@pytest.mark.parametrize("how", ["killed", "suspended"])
def test_a_vault_that_goes_away_does_not_fail_the_build(
    how: str, firebuild: Firebuild, server: DevServer, tmp_path: Path
) -> None:
    scene = Scene.made(server.api, "pki")
    limits = {"retry_for": "2s", "timeout": "1s"}
    section = scene.section(server.address, framework={"revoke_at_end": True}, **limits)
    during = server.kill if how == "killed" else server.process.suspend
    outcome = build(firebuild, tmp_path, section, scene, during)
    assert outcome.status == 0, outcome
    kinds = [event["event"] for event in outcome.events]
    assert "image-stored" in kinds
    assert "build-failed" not in kinds
    said = [event["message"] for event in outcome.events if event["event"] == "notice"]
    assert any("revok" in message for message in said), said
    assert "Traceback" not in outcome.errors
    assert outcome.seconds < 60
    assert firebuild.leftovers() == []
