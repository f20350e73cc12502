"""Brings up the network of a machine: addresses and routes by ioctl (netdevice(7), rtnetlink's elder)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from .init_settings import InitError, NetworkSettings, class_netmask, same_network
from .init_system import missing_modules_hint, wait_for

_SIOCADDRT = 0x890B
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP = 1
_RTF_UP, _RTF_GATEWAY, _RTF_HOST, _RTF_REJECT = 1, 2, 4, 0x200
_DEVICES = "/sys/class/net"
_DEVICE_SECONDS = 5.0
_ANY = "0.0.0.0"  # noqa: S104 - an empty field, nothing is bound to it
_ALL_ONES = "255.255.255.255"

CLOSED = (
    (_ANY, "255.0.0.0"),
    ("169.254.0.0", "255.255.0.0"),
    ("224.0.0.0", "240.0.0.0"),
    ("240.0.0.0", "240.0.0.0"),
)
"""What a network of RUN steps keeps away: link-local addresses, where clouds have their metadata, and what
has no meaning beyond one's own network (RFC 6890)."""


def bring_up(
    settings: NetworkSettings,
    metadata_host: str,
    *,
    resolv_conf: str = "/etc/resolv.conf",
) -> None:
    """Bring up loopback and, unless the method is `none`, one interface with a route to the metadata.

    Args:
        settings: the addresses, or where they come from.
        metadata_host: the host in the address of the metadata service.
        resolv_conf: gets the name servers, where there are any.

    Raises:
        InitError: there is no interface, no answer to DHCP, or the kernel refused an address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        interface = Interface(control, "lo")
        try:
            interface.set_up()
            if settings.method == "none":
                return
            interface = Interface(control, _device(settings.device, _DEVICES, _DEVICE_SECONDS))
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
        """Bring the interface up (IFF_UP)."""
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
        route = _route(destination, netmask, flags, gateway or _ANY, ctypes.addressof(device))
        try:
            self._ioctl(self._control, _SIOCADDRT, route)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise

    def _ask(self, request: int, data: bytes) -> bytes:
        # struct ifreq: 16 bytes of name, 24 of data
        return self._ioctl(self._control, request, struct.pack("16s24s", os.fsencode(self.name), data))


def reject(control: socket.socket, destination: str, netmask: str) -> None:
    """Refuse every packet to a network.

    Args:
        control: any IPv4 socket of the network namespace.

    Raises:
        OSError: the kernel does not let this process.
    """
    fcntl.ioctl(control, _SIOCADDRT, _route(destination, netmask, _RTF_UP | _RTF_REJECT))


def _route(destination: str, netmask: str, flags: int, gateway: str = _ANY, device: int = 0) -> bytes:
    # struct rtentry of linux/route.h
    return struct.pack(
        "@L16s16s16sHhLPhPLLH",
        *(0, _sockaddr(destination), _sockaddr(gateway), _sockaddr(netmask), flags),
        *(0, 0, 0, 0, device, 0, 0, 0),
    )


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


# --- DHCP: as much as a machine needs that lives for one build: one lease, never renewed (RFC 2131) ------

_CLIENT_PORT, _SERVER_PORT = 68, 67
_REQUEST, _REPLY = 1, 2
_DISCOVER, _OFFER, _ASK, _ACK, _NAK = 1, 2, 3, 5, 6
_BROADCAST = 0x8000
_COOKIE = b"\x63\x82\x53\x63"
_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_OPTION_MASK, _OPTION_ROUTER, _OPTION_DNS, _OPTION_ADDRESS = 1, 3, 6, 50
_OPTION_TYPE, _OPTION_SERVER, _OPTION_WANTED, _OPTION_END = 53, 54, 55, 255
_NOTHING = bytes(4)
_ATTEMPT_SECONDS = (0.5, 1.0, 2.0, 4.0)
_MAX_PACKET = 4096


class Reply(NamedTuple):
    """What a server said: which kind of message, the address for us, and the options by number."""

    kind: int
    address: bytes
    options: dict[int, bytes]


def request_lease(device: str) -> NetworkSettings:
    """Ask on `device` for addresses.

    Args:
        device: an interface that is up.

    Raises:
        InitError: nobody answered.
        OSError: the interface can't be used.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(device))
        link.bind(("", _CLIENT_PORT))
        with open(f"/sys/class/net/{device}/address", encoding="ascii") as file:
            hardware = bytes.fromhex(file.read().strip().replace(":", ""))
        for seconds in _ATTEMPT_SECONDS:
            transaction = int.from_bytes(os.urandom(4), "big")
            conversation = _Conversation(link, hardware, transaction, seconds)
            lease = conversation.lease()
            if lease is not None:
                return lease
    raise InitError("network", f"no DHCP server answered on {device} in {sum(_ATTEMPT_SECONDS):g} seconds")


class _Conversation:
    """One attempt: discover, offer, request, acknowledgement."""

    def __init__(self, link: socket.socket, hardware: bytes, transaction: int, seconds: float) -> None:
        self._link = link
        self._hardware = hardware
        self._transaction = transaction
        self._deadline = time.monotonic() + seconds

    def lease(self) -> NetworkSettings | None:
        self._send({_OPTION_TYPE: bytes([_DISCOVER])})
        offer = self._receive((_OFFER,))
        if offer is None:
            return None
        wanted = {_OPTION_TYPE: bytes([_ASK]), _OPTION_ADDRESS: offer.address}
        if _OPTION_SERVER in offer.options:
            wanted[_OPTION_SERVER] = offer.options[_OPTION_SERVER]
        self._send(wanted)
        answer = self._receive((_ACK, _NAK))
        return settings_of(answer) if answer is not None and answer.kind == _ACK else None

    def _send(self, options: dict[int, bytes]) -> None:
        options = {**options, _OPTION_WANTED: bytes([_OPTION_MASK, _OPTION_ROUTER, _OPTION_DNS])}
        packet = encode(_REQUEST, self._transaction, self._hardware, options)
        self._link.sendto(packet, ("255.255.255.255", _SERVER_PORT))

    def _receive(self, kinds: tuple[int, ...]) -> Reply | None:
        while (left := self._deadline - time.monotonic()) > 0:
            self._link.settimeout(left)
            try:
                packet = self._link.recv(_MAX_PACKET)
            except TimeoutError:
                break
            reply = decode(packet, self._transaction)
            if reply is not None and reply.kind in kinds:
                return reply
        return None


def encode(
    operation: int, transaction: int, hardware: bytes, options: dict[int, bytes], address: bytes = _NOTHING
) -> bytes:
    """Write a message; replies to it are asked for by broadcast, because there is no address yet."""
    header = _HEADER.pack(
        *(operation, 1, len(hardware), 0, transaction, 0, _BROADCAST),
        *(_NOTHING, address, _NOTHING, _NOTHING, hardware, b"", b"", _COOKIE),
    )
    fields = [bytes([number, len(value)]) + value for number, value in options.items()]
    return header + b"".join(fields) + bytes([_OPTION_END])


def decode(packet: bytes, transaction: int) -> Reply | None:
    """Read a server's message; None when it is malformed or meant for somebody else."""
    if len(packet) < _HEADER.size:
        return None
    header = _HEADER.unpack_from(packet)
    if (header[0], header[4], header[-1]) != (_REPLY, transaction, _COOKIE):
        return None
    options: dict[int, bytes] = {}
    place = _HEADER.size
    while place + 1 < len(packet) and packet[place] != _OPTION_END:
        if packet[place] == 0:  # padding
            place += 1
            continue
        number, length = packet[place : place + 2]
        options[number] = packet[place + 2 : place + 2 + length]
        place += 2 + length
    return Reply((options.get(_OPTION_TYPE) or b"\0")[0], header[8], options)


def settings_of(reply: Reply) -> NetworkSettings:
    """Return what an acknowledgement gives us."""
    address = socket.inet_ntoa(reply.address)
    mask, routers, servers = (
        _addresses(reply.options.get(number, b"")) for number in (_OPTION_MASK, _OPTION_ROUTER, _OPTION_DNS)
    )
    netmask = mask[0] if mask else class_netmask(address)
    return NetworkSettings(
        "static", address, netmask, routers[0] if routers else "", name_servers=tuple(servers[:2])
    )


def _addresses(data: bytes) -> list[str]:
    return [socket.inet_ntoa(data[place : place + 4]) for place in range(0, len(data) - 3, 4)]
