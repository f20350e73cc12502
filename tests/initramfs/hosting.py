"""The host of one machine, in a network namespace of its own: metadata, certificates, bootstrap server.

Runs as a program: reads a scenario as JSON from standard input, starts the machine that it names, and
writes what happened as JSON to standard output. Nothing here reaches any network but the namespace's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firebuild_bootstrap.guest.init_network import Interface
from support import ending_of


@dataclass(frozen=True)
class Scenario:
    """What to start and what to serve to it.

    Args:
        machine: the command that is the machine; its standard output is the serial console.
        directory: holds the Dockerfile and the build context.
        address: how the guest reaches this host.
        metadata: `whole`, `empty` (without the build), or `none` (nobody serves).
        seconds: after which the machine is ended by force.
        interrupt_at: what a RUN step writes when the machine's first process is to get a SIGINT; this needs a
            machine that is a program with that process as its child.
    """

    machine: Sequence[str]
    directory: str
    address: str = "169.254.169.254"
    metadata: str = "whole"
    seconds: float = 60.0
    interrupt_at: str = ""


@dataclass(frozen=True)
class Happened:
    """How it went.

    Args:
        status: exit status of the machine, None when it had to be ended by force.
        serial: all that came over the serial console.
        ending: how the build ended, as its server saw it; empty when it did not.
        message: the server's words for a failure.
        output: what RUN steps wrote.
        refused: peers that the server turned away.
        bootstrap_left: the credentials are still in the metadata.
        seconds: how long the machine lived.
    """

    status: int | None
    serial: str
    ending: str
    message: str
    output: str
    refused: int
    bootstrap_left: bool
    seconds: float


class Output:
    """Keeps what RUN steps wrote, and acts on a word in it."""

    def __init__(self) -> None:
        self.data = b""
        self.word = b""
        self.action: Callable[[], None] = lambda: None

    def __call__(self, event: Any) -> None:
        self.data += getattr(event, "data", b"")
        if self.word and self.word in self.data:
            self.word = b""
            self.action()


def host(scenario: Scenario) -> Happened:
    """Serve the machine until it ends."""
    from firebuild_bootstrap.mmds import BOOTSTRAP_WIPE, DataStore, MetadataEmulator

    with ExitStack() as cleanup:
        store, output = DataStore(), Output()
        server, document = _serve(cleanup, scenario, output, lambda: store.patch(BOOTSTRAP_WIPE))
        if scenario.metadata != "whole":
            del document["latest"]["meta-data"]["Bootstrap"]
        store.put(document)
        if scenario.metadata != "none":
            emulator = MetadataEmulator(store, ("127.0.0.1", 80))
            emulator.start()
            cleanup.callback(emulator.stop)
        began = time.monotonic()
        status, serial = _boot(scenario, output)
        seconds = time.monotonic() - began
        outcome = server.wait(0.5)
        left = "Bootstrap" in store.get("/latest/meta-data")
        return Happened(
            status,
            serial,
            ending=ending_of(outcome) if outcome else "",
            message=outcome.message if outcome else "",
            output=output.data.decode("utf-8", "replace"),
            refused=server.refused_peers,
            bootstrap_left=left,
            seconds=seconds,
        )


def _serve(cleanup: ExitStack, scenario: Scenario, events: Any, on_connected: Any) -> tuple[Any, Any]:
    from firebuild_bootstrap.context import BuildContext
    from firebuild_bootstrap.dockerfile import DockerfileSource, read_graph
    from firebuild_bootstrap.lowering import lower
    from firebuild_bootstrap.mmds import MetadataDocument, bootstrap_block
    from firebuild_bootstrap.service import BootstrapServer
    from firebuild_pki import open_authority

    directory = Path(scenario.directory)
    dockerfile = directory / "Dockerfile"
    downloads = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    context = cleanup.enter_context(BuildContext(directory, dockerfile, downloads=lambda: downloads))
    graph = read_graph(DockerfileSource.read(dockerfile), images=_Bases())
    steps = lower(graph.target, lambda _: context)
    authority = cleanup.enter_context(open_authority(build_id="b1"))
    guest = authority.issue_guest()
    server = BootstrapServer(
        commands=[step.command for step in steps],
        resources={name: resource for step in steps for name, resource in step.resources.items()},
        server_material=authority.issue_server(),
        guest_material=guest,
        events=events,
        on_guest_connected=on_connected,
        runtime_directory=downloads,
    )
    port = server.start().rpartition(":")[2]
    cleanup.callback(server.stop)
    block = bootstrap_block(guest, host_port=f"{scenario.address}:{port}", host_time=time.time())
    return server, MetadataDocument(bootstrap=block, vmm_id="b1").to_json()


class _Bases:
    def resolve(self, _reference: str) -> Any:
        from firebuild_bootstrap.image.config import ImageConfig

        return ImageConfig()


def _boot(scenario: Scenario, output: Output) -> tuple[int | None, str]:
    machine = subprocess.Popen(
        scenario.machine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output.word, output.action = scenario.interrupt_at.encode(), lambda: _interrupt_child(machine.pid)
    try:
        serial, _ = machine.communicate(timeout=scenario.seconds)
        return machine.returncode, serial.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        machine.kill()
        serial, _ = machine.communicate()
        return None, serial.decode("utf-8", "replace")


def _interrupt_child(pid: int) -> None:
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(child), signal.SIGINT)


def run(scenario: Scenario) -> Happened:
    """Host the machine of a scenario in a fresh network namespace."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--kill-child", "--fork", sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        input=json.dumps(asdict(scenario)),
        capture_output=True,
        text=True,
        timeout=scenario.seconds + 60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Happened(**json.loads(done.stdout))


if __name__ == "__main__":
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        Interface(control, "lo").set_up()
    os.environ["GRPC_VERBOSITY"] = "NONE"
    json.dump(asdict(host(Scenario(**json.load(sys.stdin)))), sys.stdout)
