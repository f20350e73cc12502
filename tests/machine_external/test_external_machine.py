"""The machine itself, apart from builds: what happens in which order, and what may be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.base import MachineExit
from firebuild_bootstrap.machine.external.driver import ExternalMachine
from firebuild_bootstrap.machine.external.settings import ExternalSettings
from firebuild_bootstrap.machine.workspace import Workspace

pytestmark = [pytest.mark.needs("bwrap")]
DOCUMENT = {"latest": {"meta-data": {"A": "1", "B": "2"}}}


def machine(workspace: Workspace, path: Path, **settings: Any) -> ExternalMachine:
    target = {"file": str(path)}
    return ExternalMachine(workspace, ExternalSettings.model_validate({"metadata": target, **settings}))


def written(path: Path) -> Any:
    return json.loads(path.read_text())["latest"]["meta-data"]


def test_nobody_sees_the_metadata_before_everything_is_ready(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    made = machine(workspace, path)
    made.metadata.put(DOCUMENT)
    made.metadata.patch({"latest": {"meta-data": {"A": None}}})
    made.prepare([])
    assert not path.exists()
    made.start()
    assert written(path) == {"B": "2"}
    made.start()  # a second time it changes nothing
    made.metadata.patch({"latest": {"meta-data": {"B": None}}})
    assert written(path) == {}
    made.metadata.put(DOCUMENT)
    assert written(path) == {"A": "1", "B": "2"}
    for _ in range(2):
        made.close()
    assert not path.exists()


def test_without_a_drive_there_is_no_end_to_wait_for(workspace: Workspace, tmp_path: Path) -> None:
    made = machine(workspace, tmp_path / "m.json")
    assert (made.poll(), made.wait(), made.stop()) == (None, MachineExit(0), None)
    assert made.tree() is None
    assert made.layers() == ()
    made.close()


@pytest.mark.parametrize(
    ("settings", "dialled"),
    [
        ({}, "127.0.0.1:{port}"),
        ({"bind": "::1"}, "[::1]:{port}"),
        ({"advertise": "build.example"}, "build.example:{port}"),
        ({"bind": "0.0.0.0", "advertise": "[fd00::1]:7000"}, "[fd00::1]:7000"),
    ],
)
def test_the_guest_gets_the_address_that_it_can_dial(
    workspace: Workspace, tmp_path: Path, settings: dict[str, str], dialled: str
) -> None:
    listening = machine(workspace, tmp_path / "m.json", **settings).listen()
    with listening.listener:
        port = listening.listener.getsockname()[1]
        assert listening.host_port == dialled.format(port=port)


def test_a_certain_port_is_used_and_a_taken_one_is_named(workspace: Workspace, tmp_path: Path) -> None:
    free = machine(workspace, tmp_path / "m.json").listen()
    with free.listener, pytest.raises(InputError, match="cannot listen") as caught:
        machine(workspace, tmp_path / "m.json", bind=free.host_port).listen()
    assert "machine.external.bind" in str(caught.value.hint)
    again = machine(workspace, tmp_path / "m.json", bind=free.host_port).listen()
    with again.listener:
        assert again.host_port == free.host_port
