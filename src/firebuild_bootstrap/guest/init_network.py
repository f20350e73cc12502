"""Brings up the network of a machine: addresses and routes by ioctl (netdevice(7), rtnetlink's elder)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from .init_dhcp import request_lease
from .init_report import InitError
from .init_settings import NetworkSettings, same_network
from .init_system import missing_modules_hint, wait_for

_SIOCADDRT = 0x890B
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY, _RTF_HOST = 1, 2, 4
_DEVICE_SECONDS = 5.0
_ANY = "0.0.0.0"  # noqa: S104 - an empty field, nothing is bound to it
_ALL_ONES = "255.255.255.255"


def bring_up(
    settings: NetworkSettings,
    metadata_host: str,
    *,
    devices: str = "/sys/class/net",
    resolv_conf: str = "/etc/resolv.conf",
    seconds: float = _DEVICE_SECONDS,
) -> None:
    """Bring up loopback and, unless the method is `none`, one interface with a route to the metadata.

    Args:
        settings: the addresses, or where they come from.
        metadata_host: the host in the address of the metadata service.
        devices: lists the interfaces.
        resolv_conf: gets the name servers, where there are any.
        seconds: how long to wait for the interface.

    Raises:
        InitError: there is no interface, no answer to DHCP, or the kernel refused an address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        interface = Interface(control, "lo")
        try:
            interface.set_up()
            if settings.method == "none":
                return
            interface = Interface(control, _device(settings.device, devices, seconds))
            interface.set_up()
            if settings.method == "dhcp":
                settings = request_lease(interface.name)
            interface.set_address(settings.address, settings.netmask)
            _add_routes(interface, settings, metadata_host)
        except OSError as error:
            raise InitError(
                "network", f"{interface.name} can't be configured: {error.strerror or error}"
            ) from error
    if settings.name_servers:
        os.makedirs(os.path.dirname(resolv_conf), exist_ok=True)
        with open(resolv_conf, "w", encoding="ascii") as file:
            file.writelines(f"nameserver {address}\n" for address in settings.name_servers)


def _device(name: str, devices: str, seconds: float) -> str:
    found: list[str] = []

    def look() -> bool:
        here = sorted(os.listdir(devices)) if os.path.isdir(devices) else []
        found[:] = [device for device in here if device == name or (not name and device != "lo")]
        return bool(found)

    if not wait_for(look, seconds):
        what = f"interface {name}" if name else "network interface"
        raise InitError("network", f"there is no {what} after {seconds:g} seconds{missing_modules_hint()}")
    return found[0]


def _add_routes(interface: Interface, settings: NetworkSettings, metadata_host: str) -> None:
    if settings.gateway:
        if not same_network((settings.address, settings.gateway), settings.netmask):
            interface.add_route(settings.gateway, _ALL_ONES)
        interface.add_route(_ANY, _ANY, settings.gateway)
    with suppress(OSError):
        # Names and other families have to be reached by the other routes.
        socket.inet_pton(socket.AF_INET, metadata_host)
        if not metadata_host.startswith("127."):
            interface.add_route(metadata_host, _ALL_ONES)


class Interface:
    """One network interface, by its name; every method raises OSError where the kernel refuses."""

    def __init__(self, control: socket.socket, name: str, ioctl: Callable[..., bytes] = fcntl.ioctl) -> None:
        self._control = control
        self._ioctl = ioctl
        self.name = name

    def set_up(self) -> None:
        """Switch it on."""
        flags = struct.unpack("16xH", self._ask(_SIOCGIFFLAGS, b"")[:18])[0]
        self._ask(_SIOCSIFFLAGS, struct.pack("H", flags | _IFF_UP))

    def set_address(self, address: str, netmask: str) -> None:
        """Give it an address and the mask of its network."""
        self._ask(_SIOCSIFADDR, _sockaddr(address))
        self._ask(_SIOCSIFNETMASK, _sockaddr(netmask))

    def add_route(self, destination: str, netmask: str, gateway: str = "") -> None:
        """Add a route through it; one that exists is left alone."""
        flags = _RTF_UP | (_RTF_GATEWAY if gateway else 0) | (_RTF_HOST if netmask == _ALL_ONES else 0)
        device = ctypes.create_string_buffer(os.fsencode(self.name))
        # struct rtentry of linux/route.h
        route = struct.pack(
            "@L16s16s16sHhLPhPLLH",
            *(0, _sockaddr(destination), _sockaddr(gateway or _ANY), _sockaddr(netmask), flags),
            *(0, 0, 0, 0, ctypes.addressof(device), 0, 0, 0),
        )
        try:
            self._ioctl(self._control, _SIOCADDRT, route)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    def _ask(self, request: int, data: bytes) -> bytes:
        # struct ifreq: 16 bytes of name, 24 of data
        return self._ioctl(self._control, request, struct.pack("16s24s", os.fsencode(self.name), data))


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
