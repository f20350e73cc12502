"""The host of a machine that is started and not built: serves its metadata in a network namespace of its own.

Runs as a program: reads the command that is the machine, and the metadata, as JSON from standard input, and
writes the machine's exit status and what came over its serial console as JSON to standard output.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from firebuild_bootstrap.guest.init_network import Interface


def boot(command: Sequence[str], metadata: Mapping[str, Any], seconds: float) -> tuple[int | None, str]:
    """Run a machine.

    Args:
        command: starts it; its standard output is the serial console.
        metadata: what its metadata service serves.
        seconds: after which it is ended by force; the status is None then.
    """
    unshare = ["unshare", "--user", "--map-root-user", "--net", "--kill-child", "--fork"]
    done = subprocess.run(
        [*unshare, sys.executable, __file__],
        input=json.dumps({"command": command, "metadata": metadata, "seconds": seconds}),
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    status, serial = json.loads(done.stdout)
    return status, serial


def host(command: Sequence[str], metadata: Mapping[str, Any], seconds: float) -> tuple[int | None, str]:
    """Do it; nothing but this namespace's own addresses can be reached."""
    from firebuild_bootstrap.mmds import DataStore, MetadataEmulator

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        Interface(control, "lo").set_up()
    store = DataStore()
    store.put(metadata)
    emulator = MetadataEmulator(store, ("127.0.0.1", 80))
    emulator.start()
    machine = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        serial, _ = machine.communicate(timeout=seconds)
        return machine.returncode, serial.decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        machine.kill()
        return None, machine.communicate()[0].decode("utf-8", "replace")
    finally:
        emulator.stop()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    os.environ["GRPC_VERBOSITY"] = "NONE"
    json.dump(host(**request), sys.stdout)
