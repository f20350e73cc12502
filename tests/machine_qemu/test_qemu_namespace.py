"""The network of a machine: nothing but its own loopback, and a program without privileges in it."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine.qemu.namespace import HandedFile, MachineNamespace, path_of
from firebuild_bootstrap.mmds import DataStore, MetadataEmulator
from firebuild_bootstrap.sandbox import Runtime, Sandbox

pytestmark = [pytest.mark.needs("userns")]

PYTHON = "/usr/bin/python3"
LOOK = """
import json, os, resource, socket
def connects(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
print(json.dumps({
    "interfaces": [name for _, name in socket.if_nameindex()],
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd")),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")],
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "handed": open("%(handed)s").read(),
    "device": os.path.samefile("%(device)s", "%(device_path)s"),
    "host": connects(%(port)d),
    "mine": connects(80),
    "uid": os.getuid(),
    "home": os.path.exists("%(secret)s"),
}))
"""


@pytest.fixture
def namespace(sandbox: Sandbox, runtime: Runtime) -> Iterator[MachineNamespace]:
    made = MachineNamespace(sandbox, runtime, (80, 0))
    yield made
    made.close()
    made.close()


def finish(namespace: MachineNamespace, argv: Sequence[str], *files: HandedFile, **more: Any) -> str:
    namespace.run(argv, files, **more)
    status = namespace.process.wait(60)
    namespace.process.kill()  # so that there is an end to what it has written
    said = namespace.output.read().decode()
    assert status == 0, said
    return said


@pytest.fixture
def device() -> Iterator[Path]:
    """A file in a directory that the sandbox has, too: its own."""
    with tempfile.NamedTemporaryFile(dir="/tmp") as file:
        yield Path(file.name)


def test_a_program_sees_its_files_its_loopback_and_nothing_else(
    namespace: MachineNamespace, tmp_path: Path, device: Path
) -> None:
    handed = tmp_path / "secret/file"
    handed.parent.mkdir(mode=0o700)
    handed.write_text("for the program")
    with socket.create_server(("127.0.0.1", 0)) as others:
        values = {
            "handed": path_of(0),
            "device": device,
            "device_path": path_of(1),
            "port": others.getsockname()[1],
            "secret": handed,
        }
        seen = json.loads(
            finish(namespace, [PYTHON, "-c", LOOK % values], HandedFile(handed), devices=[device])
        )
    assert seen.pop("descriptors")[:5] == [0, 1, 2, 3, 100]  # 3 is the listing itself
    assert seen == {
        "interfaces": ["lo"],
        "capabilities": ["0" * 16] * 5,
        "core": [0, 0],
        "handed": "for the program",
        "device": True,
        "host": False,
        "mine": True,
        "uid": 0,
        "home": False,
    }


def test_what_listens_on_its_ports_is_served_from_here(namespace: MachineNamespace) -> None:
    store = DataStore()
    store.put({"latest": {"meta-data": {"VMMID": "vm-7"}}})
    emulator = MetadataEmulator(store, namespace.listeners[0])
    assert emulator.start() == "http://127.0.0.1:80"
    ask = (
        "import urllib.request as r\n"
        "ask = r.Request('http://127.0.0.1/latest/api/token', method='PUT',"
        " headers={'X-metadata-token-ttl-seconds': '60'})\n"
        "token = r.urlopen(ask).read().decode()\n"
        "ask = r.Request('http://127.0.0.1/latest/meta-data/VMMID', headers={'X-metadata-token': token})\n"
        "print(r.urlopen(ask).read().decode())"
    )
    try:
        assert finish(namespace, [PYTHON, "-c", ask]) == "vm-7\n"
    finally:
        emulator.stop()
    assert namespace.listeners[0].fileno() == -1


def test_its_ports_get_into_no_other_program(sandbox: Sandbox, runtime: Runtime) -> None:
    with closing(MachineNamespace(sandbox, runtime, (0,), sockets=2)) as made:
        assert [one.get_inheritable() for one in (*made.listeners, *made.sockets)] == [False] * 3


def test_a_file_that_can_not_be_opened_is_named(namespace: MachineNamespace, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="gone can't be opened: No such file"):
        namespace.run(["/bin/true"], [HandedFile(tmp_path / "gone")])


def test_a_program_that_does_not_exist_says_so(namespace: MachineNamespace) -> None:
    namespace.run(["/no/such/program"])
    assert namespace.process.wait(60) == 1
    assert namespace.output.read() == b"/no/such/program can't be run: No such file or directory\n"


def test_a_namespace_that_has_ended_takes_no_program(namespace: MachineNamespace) -> None:
    namespace.process.kill()
    with pytest.raises(MachineError, match="the machine's network is gone: its process ended with status"):
        namespace.run(["/bin/true"])


def test_a_port_that_can_not_be_had_is_an_error(sandbox: Sandbox, runtime: Runtime) -> None:
    with pytest.raises(MachineError, match=r"network could not be made: .*Address already in use"):
        MachineNamespace(sandbox, runtime, (80, 80))


def test_a_holder_that_takes_too_long_is_given_up(
    sandbox: Sandbox, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_bootstrap.machine.qemu.namespace._START_SECONDS", 0.0001)
    with pytest.raises(MachineError, match="the machine's network could not be made: timed out"):
        MachineNamespace(sandbox, runtime)


def test_a_sandbox_that_can_not_be_made_leaves_no_descriptor(sandbox: Sandbox, runtime: Runtime) -> None:
    before = os.listdir("/proc/self/fd")
    broken = Sandbox(sandbox.idmap, bwrap=Path("/no/bwrap"))
    with pytest.raises(MachineError, match="/no/bwrap"):
        MachineNamespace(broken, runtime)
    assert os.listdir("/proc/self/fd") == before


def test_a_holder_whose_parent_lets_go_ends(sandbox: Sandbox, runtime: Runtime) -> None:
    namespace = MachineNamespace(sandbox, runtime)
    namespace._control.close()
    assert namespace.process.wait(60) == 0
    namespace.close()
