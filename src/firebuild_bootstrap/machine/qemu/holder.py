"""Holds a network namespace, opens the ports in it, and then becomes QEMU.

Runs in a sandbox with a loopback interface and no other, as `python -m … SOCKET-FD TUN-FD PORT…`. It sends
one message over the socket, with a listening socket for each PORT and, where TUN-FD is not -1, the end of a
tap device (see `routes`). Then it waits for a message with the command to run and the files for it. Without
one it ends.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from typing import Any, Final

from firebuild_bootstrap.guest.kernel import drop_capabilities
from firebuild_bootstrap.machine.qemu.routes import open_uplink

# The files that come with the command get these numbers, in their order.
FIRST_FILE: Final = 100
_MAX_FILES: Final = 16
_MAX_MESSAGE: Final = 64 * 1024
READY: Final = b"ready"


def open_ports(ports: list[int]) -> list[socket.socket]:
    """Listen on loopback; port 0 picks a free one."""
    return [socket.create_server(("127.0.0.1", port), backlog=64) for port in ports]


def receive_command(control: socket.socket) -> dict[str, Any] | None:
    """Wait for the command; its files are at their numbers then. None when the other end is gone."""
    data, files, _, _ = socket.recv_fds(control, _MAX_MESSAGE, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, FIRST_FILE + number, inheritable=True)
        os.close(descriptor)
    command: dict[str, Any] = json.loads(data)
    return command


def become(command: dict[str, Any]) -> None:
    """Replace this process by the command, without any privilege over its namespaces and without core dumps.

    A core dump would hold the memory of the guest, and with it its key.
    """
    for path, target in command["links"].items():
        os.symlink(target, path)
    os.closerange(3, FIRST_FILE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    drop_capabilities(frozenset())
    argv = command["argv"]
    try:
        os.execv(argv[0], argv)  # noqa: S606 - it is the host's own command
    except OSError as error:
        sys.exit(f"{argv[0]} can't be run: {error.strerror}")


def main() -> None:
    """Do all of it."""
    tun, *ports = map(int, sys.argv[2:])
    with socket.socket(fileno=int(sys.argv[1])) as control:
        command = hand_out(control, ports, tun)
    if command is not None:
        become(command)


def hand_out(control: socket.socket, ports: list[int], tun: int) -> dict[str, Any] | None:
    """Open everything, send it, and wait for the command.

    Args:
        tun: the host's /dev/net/tun; negative for none.
    """
    try:
        opened = [listener.detach() for listener in open_ports(ports)]
        if tun >= 0:
            opened.append(open_uplink(tun))
    except OSError as error:
        sys.exit(str(error))
    socket.send_fds(control, [READY], opened)
    for descriptor in opened:
        os.close(descriptor)
    return receive_command(control)


if __name__ == "__main__":
    main()
