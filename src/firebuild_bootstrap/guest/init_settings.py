"""What the init of a machine is told, as `ip=` and `firebuild.*`, and what it says (docs/initramfs.md)."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from .metadata import DEFAULT_ADDRESS

_PREFIX = "firebuild."
_STATIC = ("off", "none", "")
_DYNAMIC = ("dhcp", "on", "any")
_CACHE = re.compile("[0-9a-f]{64}")
_ENDS = ("reboot", "poweroff")


class NetworkSettings(NamedTuple):
    """How the first network interface is set up.

    Args:
        method: `static`, `dhcp`, or `none` for loopback only.
        address: the machine's own.
        netmask: of its network.
        gateway: the default route; empty for none.
        device: name of the interface; empty for the first one.
        name_servers: for /etc/resolv.conf.
    """

    method: str = "static"
    address: str = ""
    netmask: str = ""
    gateway: str = ""
    device: str = ""
    name_servers: tuple[str, ...] = ()


# Enough for a metadata service, on Firecracker as on QEMU's user network 169.254.0.0/16.
LINK_LOCAL = NetworkSettings(address="169.254.0.15", netmask="255.255.0.0")


class InitSettings(NamedTuple):
    """All settings of the init; the member names are those after `firebuild.`, times are seconds.

    Args:
        root: the drive with the image.
        scratch: an empty drive for what steps change, so that `root` is only read; empty where steps change
            that one.
        caches: SHA-256 of the ids of cache mounts, whose drives follow the scratch drive.
    """

    root: str = "/dev/vda"
    scratch: str = ""
    caches: tuple[str, ...] = ()
    rootfstype: str = "ext4"
    mmds: str = DEFAULT_ADDRESS
    mmds_timeout: float = 30.0
    connect_timeout: float = 30.0
    end: str = "reboot"
    network: NetworkSettings = LINK_LOCAL


def parse_command_line(text: str) -> InitSettings:
    """Read the settings from the kernel's command line; the last of several counts.

    Raises:
        InitError: a setting is unknown or makes no sense.
    """
    found: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name == "ip":
            found["network"] = parse_ip(value)
        elif name.startswith(_PREFIX):
            key = name.removeprefix(_PREFIX)
            found[key] = _setting(key, value)
    return InitSettings(**found)


def _setting(key: str, value: str) -> str | float | tuple[str, ...]:
    if key not in InitSettings._fields or key == "network":
        raise InitError("settings", f"{_PREFIX}{key}: there is no such setting")
    if key.endswith("_timeout"):
        return _seconds(key, value)
    if key == "caches":
        return _caches(value)
    if key == "end" and value not in _ENDS:
        raise InitError("settings", f"firebuild.end: expected {' or '.join(_ENDS)}, found {value!r}")
    return value


def _caches(value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not all(_CACHE.fullmatch(name) for name in names):
        raise InitError("settings", f"firebuild.caches: expected SHA-256 sums, found {value!r}")
    return names


def _seconds(key: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InitError("settings", f"{_PREFIX}{key}: expected seconds, found {value!r}")
    return seconds


def parse_ip(value: str) -> NetworkSettings:
    """Read `ip=` as the kernel does (Documentation/admin-guide/nfs/nfsroot.rst).

    Raises:
        InitError: it has another form.
    """
    if ":" not in value and value in (*_STATIC, *_DYNAMIC):
        return NetworkSettings("dhcp" if value in _DYNAMIC else "none")
    parts = [part.strip() for part in value.split(":")] + [""] * 10
    client, _server, gateway, netmask, _hostname, device, method = parts[:7]
    if not client:
        if method not in (*_STATIC, *_DYNAMIC):
            raise InitError("settings", f"ip={value}: expected dhcp or off in field 7, found {method!r}")
        return NetworkSettings("none" if method in ("off", "none") else "dhcp", device=device)
    netmask = netmask or class_netmask(client)
    name_servers = tuple(part for part in parts[7:9] if part)
    for address in (client, netmask, gateway or client, *name_servers):
        _check_address(value, address)
    return NetworkSettings("static", client, netmask, gateway, device, name_servers)


def class_netmask(address: str) -> str:
    """Return the mask of an address by its historical class, as the kernel assumes it."""
    first = address.partition(".")[0]
    number = int(first) if first.isdecimal() else 255
    return "255.0.0.0" if number < 128 else "255.255.0.0" if number < 192 else "255.255.255.0"


def same_network(addresses: Sequence[str], netmask: str) -> bool:
    """Say whether all addresses are in one network."""
    mask = int.from_bytes(socket.inet_aton(netmask), "big")
    return len({int.from_bytes(socket.inet_aton(address), "big") & mask for address in addresses}) == 1


def _check_address(value: str, address: str) -> None:
    try:
        socket.inet_pton(socket.AF_INET, address)
    except OSError:
        raise InitError("settings", f"ip={value}: {address!r} is not an IPv4 address") from None


# --- what it says: a report on the console, for whoever started the machine ---------------------------

PREFIX = "firebuild-initramfs: "
VERSION = 1
_MAX_MESSAGE = 1000
COMMAND = "/firebuild/command.json"
"""Where the initramfs of a machine without a host says what is executed (alone.py)."""
_CONSOLE = "/dev/console"


class InitError(Exception):
    """A stage of the init failed.

    Args:
        status: which one; the word of the report (docs/initramfs.md).
        message: what was expected and what was found.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Report(NamedTuple):
    """How a machine ended.

    Args:
        status: `success`, `failed`, or the stage that did not work.
        exit: exit status of vminit; None when it did not run.
        message: why, in words.
    """

    status: str
    exit: int | None = None
    message: str = ""

    def line(self) -> str:
        """Write the report as one line of ASCII."""
        members = {"version": VERSION, **self._asdict(), "message": self.message[:_MAX_MESSAGE]}
        return f"{PREFIX}{json.dumps(members)}"


def say(text: str, console: str = _CONSOLE) -> None:
    """Write a text to the console and wait until it is out; a machine without one stays silent."""
    with suppress(OSError):
        descriptor = os.open(console, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            # Starts on a line of its own, whatever stands there; more than a terminal's buffer is too long.
            data = memoryview(f"\n{text}\n".encode("ascii", "replace"))
            while data:
                data = data[os.write(descriptor, data) :]
            _drain(descriptor)
        finally:
            os.close(descriptor)


def _drain(descriptor: int) -> None:
    import termios

    with suppress(termios.error):  # no terminal
        termios.tcdrain(descriptor)
