"""Holds a network namespace, opens the ports in it, and then becomes QEMU.

Runs in a sandbox with a loopback interface and no other, as `python -m … SOCKET-FD TUN-FD SOCKETS PORT…`.
It sends one message over the socket, with a listening socket for each PORT, SOCKETS others that are not
connected (publishing.py) and, where TUN-FD is not -1, the end of a tap device whose other end is a process in
the host's network. The routing table, which nobody in the namespace may change later, keeps every packet for
the host itself or its link from that device. Then it waits for a message with the command to run and the
files for it. Without one it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import struct
import sys
from typing import Any, Final

from firebuild_bootstrap.guest.init_network import CLOSED, Interface, reject
from firebuild_bootstrap.guest.kernel import drop_capabilities, receive_descriptors

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
    data, files = receive_descriptors(control, _MAX_MESSAGE, _MAX_FILES)
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


def hand_out(control: socket.socket, ports: list[int], tun: int, sockets: int = 0) -> dict[str, Any] | None:
    """Open everything, send it, and wait for the command.

    Args:
        sockets: how many that are not connected.
        tun: the host's /dev/net/tun; negative for none.
    """
    try:
        opened = [listener.detach() for listener in open_ports(ports)]
        opened += [socket.socket().detach() for _ in range(sockets)]
        if tun >= 0:
            opened.append(open_uplink(tun))
    except OSError as error:
        sys.exit(str(error))
    socket.send_fds(control, [READY], opened)
    for descriptor in opened:
        os.close(descriptor)
    return receive_command(control)


DEVICE: Final = "uplink"
# Behind the tap: QEMU takes every address in here for this host's loopback, or for its resolver.
NETWORK: Final = "10.0.2.0/24"
_ADDRESS, _NETMASK, _GATEWAY = "10.0.2.15", "255.255.255.0", "10.0.2.2"
_CLOSED: Final = (("10.0.2.0", "255.255.255.128"), ("10.0.2.128", "255.255.255.128"), *CLOSED)
# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000


def open_uplink(tun: int) -> int:
    """Make the tap device and the routes, and return the device's other end.

    Args:
        tun: the host's /dev/net/tun, opened anywhere.

    Raises:
        OSError: the kernel refused something.
    """
    # A device belongs to the network namespace in which the file was opened.
    tap = os.open(f"/proc/self/fd/{tun}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TAP | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        interface = Interface(control, DEVICE)
        interface.set_address(_ADDRESS, _NETMASK)
        interface.set_up()
        interface.add_route("0.0.0.0", "0.0.0.0", _GATEWAY)  # noqa: S104 - the default route
        # The kernel has looked up the gateway by now; what follows closes its address, too.
        for destination, netmask in _CLOSED:
            reject(control, destination, netmask)
    return tap


def main() -> None:
    """Do all of it."""
    tun, sockets, *ports = map(int, sys.argv[2:])
    with socket.socket(fileno=int(sys.argv[1])) as control:
        command = hand_out(control, ports, tun, sockets)
    if command is not None:
        become(command)


if __name__ == "__main__":
    main()
