"""The way out of a machine's network namespace, and where it does not lead.

A tap device whose other end is a process in the host's network. The routing table, which nobody in the
namespace may change later, keeps every packet for the host itself or its link from that device.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Final

from firebuild_bootstrap.guest.init_network import Interface

DEVICE: Final = "uplink"
# Behind the tap: QEMU takes every address in here for this host's loopback, or for its resolver.
NETWORK: Final = "10.0.2.0/24"
_ADDRESS, _NETMASK, _GATEWAY = "10.0.2.15", "255.255.255.0", "10.0.2.2"
_CLOSED: Final = (
    ("10.0.2.0", "255.255.255.128"),
    ("10.0.2.128", "255.255.255.128"),
    ("0.0.0.0", "255.0.0.0"),  # noqa: S104 - a destination
    ("169.254.0.0", "255.255.0.0"),
    ("224.0.0.0", "240.0.0.0"),
    ("240.0.0.0", "240.0.0.0"),
)
# linux/if_tun.h, linux/sockios.h, linux/route.h
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SIOCADDRT: Final = 0x890B
_RTF_UP, _RTF_REJECT = 0x0001, 0x0200


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
            fcntl.ioctl(control, _SIOCADDRT, _rejecting(destination, netmask))
    return tap


def _rejecting(destination: str, netmask: str) -> bytes:
    # struct rtentry of linux/route.h
    return struct.pack(
        "@L16s16s16sHhLPhPLLH",
        *(0, _sockaddr(destination), _sockaddr(), _sockaddr(netmask), _RTF_UP | _RTF_REJECT),
        *(0, 0, 0, 0, 0, 0, 0, 0),
    )


def _sockaddr(address: str = "0.0.0.0") -> bytes:  # noqa: S104 - an empty field
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
