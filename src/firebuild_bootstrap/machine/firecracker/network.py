"""The network of one microVM: a tap device that exists, or one of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs import StaticAddress
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_pki.values import dataclass

_SEARCH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_NET: Final = Path("/sys/class/net")
_IFF_TAP: Final = 0x2  # linux/if_tun.h
_TUN: Final = Path("/dev/net/tun")
_MAX_TRIES: Final = 4096
_CAP_NET_ADMIN: Final = 12
_MOST_INTERFACES: Final = 64 << 20  # bytes; about 1 KB for each of a host's


@dataclass(frozen=True)
class Interface:
    """An interface of this host: its name, its IPv4 addresses, whether it is up, the bridge it belongs to."""

    name: str
    addresses: tuple[IPv4Interface, ...]
    up: bool
    bridge: str = ""


def ip(*arguments: str) -> str:
    """Run `ip` and return what it wrote.

    Raises:
        MachineError: it failed, or is not installed.
    """
    program = shutil.which("ip", path=_SEARCH)
    if program is None:
        raise MachineError("the program ip was not found", hint="install the package iproute2")
    try:
        done = run_program(
            [program, *arguments], most=_MOST_INTERFACES, install="install the package iproute2"
        )
    except LimitExceeded as error:
        raise MachineError(f"ip {' '.join(arguments)} failed: {error}") from error
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip() or f"status {done.returncode}"
        raise MachineError(f"ip {' '.join(arguments)} failed: {words}")
    return done.stdout.decode("utf-8", "replace")


def interfaces() -> list[Interface]:
    """Return all interfaces of this host.

    Raises:
        MachineError: `ip` failed, or is not installed.
    """
    entries: list[dict[str, Any]] = json.loads(ip("-json", "address") or "[]")
    return [_interface(entry) for entry in entries if entry]


def _interface(entry: dict[str, Any]) -> Interface:
    found = [one for one in entry.get("addr_info", ()) if one.get("family") == "inet"]
    addresses = tuple(IPv4Interface(f"{one['local']}/{one['prefixlen']}") for one in found)
    return Interface(entry["ifname"], addresses, "UP" in entry["flags"], entry.get("master", ""))


def find(name: str, among: Sequence[Interface]) -> Interface | None:
    """Return the interface `name`, or None."""
    return next((one for one in among if one.name == name), None)


def tap_owner(name: str) -> int | None:
    """Return whose the tap device `name` is, -1 when no user's; None when it is not a tap device."""
    try:
        flags = int((_NET / name / "tun_flags").read_text("ascii"), 16)
        owner = int((_NET / name / "owner").read_text("ascii"))
    except OSError:
        return None
    return owner if flags & _IFF_TAP else None


@dataclass(frozen=True)
class Link:
    """A machine's network.

    Args:
        tap: the host's end of the guest's interface.
        host: address of this host that the guest calls.
        guest: what the guest is told; None lets it ask by DHCP.
        mac: address of the guest's interface.
        namespace: path of the network namespace that the tap is in; empty for this host's own.
    """

    tap: str
    host: str
    guest: StaticAddress | None
    mac: str
    namespace: str = ""


class Network(ABC):
    """Where a machine's `Link` comes from."""

    @abstractmethod
    def check(self) -> None:
        """Make sure that `connect` will work, as far as that can be known; nothing is changed.

        Raises:
            FirebuildError: what is missing, and what to do about it.
        """

    @abstractmethod
    def connect(self) -> Link:
        """Make the link; what it makes is on the machine's list of leftovers.

        Raises:
            FirebuildError: it can't be made.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what is held in this process. Idempotent."""


class ExistingTap(Network):
    """A tap device that was made elsewhere.

    Args:
        settings: the block `network`; `tap` is set.
        uid: the user that Firecracker runs as.
        look: returns the interfaces of this host.
        owner: returns the owner of a tap device, as `tap_owner` does.
        tun: the device through which taps are opened.
    """

    def __init__(
        self,
        settings: NetworkSettings,
        *,
        uid: int,
        look: Callable[[], Sequence[Interface]] = interfaces,
        owner: Callable[[str], int | None] = tap_owner,
        tun: Path = _TUN,
    ) -> None:
        self._settings = settings
        self._name = settings.tap or ""
        self._uid = uid
        self._look = look
        self._owner = owner
        self._tun = tun

    def check(self) -> None:
        """See `Network.check`."""
        self._find()

    def connect(self) -> Link:
        """Find out its addresses; see `Network.connect`."""
        host = self._find()
        guest = guest_address(self._settings, host)
        return Link(self._name, str(host.ip), guest, self._settings.mac or mac_of(guest, self._name))

    def _find(self) -> IPv4Interface:
        every = self._look()
        tap = find(self._name, every)
        where = f"machine.firecracker.network.tap: {self._name}"
        if tap is None:
            raise InputError(
                f"{where}: there is no such interface",
                hint=f"make it (ip tuntap add dev {self._name} mode tap), or leave the setting out",
            )
        owner = self._owner(self._name)
        if owner is None:
            raise InputError(
                f"{where}: it is not a tap device", hint="make one: ip tuntap add dev NAME mode tap"
            )
        # The kernel lets any user open one without an owner, and members of a group one of that group.
        if self._uid != 0 and owner not in (-1, self._uid):
            raise InputError(
                f"{where}: Firecracker runs as user {self._uid} and may not open it: it is user {owner}'s",
                hint=f"make it for that user: ip tuntap add dev {self._name} mode tap user {self._uid}",
            )
        if self._uid == os.geteuid() and not os.access(self._tun, os.R_OK | os.W_OK):
            raise MachineError(
                f"{self._tun} can't be opened by user {self._uid}, and taps are opened through it",
                hint="modprobe tun; chmod 0666 /dev/net/tun, which is its usual mode",
            )
        if not tap.up:
            raise InputError(f"{where}: it is down", hint=f"ip link set {self._name} up")
        return self._host(tap, every)

    def _host(self, tap: Interface, every: Sequence[Interface]) -> IPv4Interface:
        bridge = find(tap.bridge, every) if tap.bridge else None
        found = [*tap.addresses, *(bridge.addresses if bridge else ())]
        wanted = self._settings.host
        if wanted is not None:
            everywhere = [address for one in every for address in one.addresses]
            found = [address for address in everywhere if str(address.ip) == wanted]
        if not found:
            raise InputError(
                f"machine.firecracker.network: this host has no address {wanted}"
                if wanted
                else f"machine.firecracker.network: {tap.name} has no IPv4 address, nor has its bridge",
                hint=f"give it one (ip address add 172.30.0.1/30 dev {tap.name}), or name it in host:",
            )
        guest_address(self._settings, found[0])
        return found[0]


class OwnTap(Network):
    """A tap device for one machine, with four addresses out of a pool. Needs root.

    Args:
        settings: the block `network`.
        uid: the user that Firecracker runs as.
        name: what identifies the build on this host.
        leftovers: gets the device.
    """

    def __init__(self, settings: NetworkSettings, *, uid: int, name: str, leftovers: Leftovers) -> None:
        self._settings = settings
        self._uid = uid
        digest = hashlib.sha256(name.encode()).hexdigest()
        self._number = int(digest[:8], 16)
        self._device = f"fb{digest[:12]}"
        self._leftovers = leftovers
        self._claim: socket.socket | None = None

    def check(self) -> None:
        """See `Network.check`."""
        if self._settings.host is not None or self._settings.guest is not None:
            raise InputError(
                "machine.firecracker.network: host and guest come from pool where no tap is named",
                hint="set pool to other addresses, or name a tap or a network of CNI",
            )
        if not may_make_taps():
            raise InputError(
                "the driver firecracker makes a tap device for each build, which needs root",
                hint="run firebuild as root, or name one of yours in machine.firecracker.network.tap",
            )
        if not _TUN.exists():
            raise MachineError(f"{_TUN} does not exist", hint="modprobe tun")
        interfaces()

    def connect(self) -> Link:
        """Make the device; see `Network.connect`."""
        block = self._claim_block()
        host, guest = (IPv4Interface(f"{address}/30") for address in block.hosts())
        self._leftovers.add_command(["ip", "link", "delete", self._device], quiet=True)
        ip("tuntap", "add", "dev", self._device, "mode", "tap", "user", str(self._uid))
        # The guest gets no other way to this host than the one address.
        with suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{self._device}/disable_ipv6").write_text("1", "ascii")
        ip("address", "add", str(host), "dev", self._device)
        ip("link", "set", self._device, "up")
        address = StaticAddress(
            str(guest), self._settings.gateway or str(host.ip), name_servers=self._settings.name_servers
        )
        mac = self._settings.mac or mac_of(address, self._device)
        return Link(self._device, str(host.ip), address, mac)

    def close(self) -> None:
        """Give the addresses back; see `Network.close`."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _claim_block(self) -> IPv4Network:
        taken = [address.network for one in interfaces() for address in one.addresses]
        for block in self._blocks():
            if any(block.overlaps(other) for other in taken):
                continue
            # Who binds the name has the addresses: the kernel lets one process of this network do so, and
            # takes the name back however that process ends.
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                claim.bind(f"\0firebuild/{block}")
            except OSError:
                claim.close()
                continue
            self._claim = claim
            return block
        raise MachineError(
            f"machine.firecracker.network.pool: all of {self._settings.pool} is in use on this host",
            hint="set it to a network that this host does not use",
        )

    def _blocks(self) -> Iterator[IPv4Network]:
        pool = IPv4Network(self._settings.pool)
        count = pool.num_addresses // 4
        for step in range(min(count, _MAX_TRIES)):
            yield IPv4Network((int(pool.network_address) + 4 * ((self._number + step) % count), 30))


def may_make_taps() -> bool:
    """Tell whether this process, and what it starts, may make interfaces (CAP_NET_ADMIN)."""
    if os.geteuid() == 0:
        return True
    ambient = next(
        (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapAmb:")),
        "CapAmb: 0",
    )
    return bool(int(ambient.split()[1], 16) >> _CAP_NET_ADMIN & 1)


def guest_address(settings: NetworkSettings, host: IPv4Interface) -> StaticAddress | None:
    """Return the guest's address beside `host`; None when it asks by DHCP.

    Raises:
        InputError: it is not set, and the network has more than one that it could be.
    """
    if settings.guest == "dhcp":
        return None
    others = (
        [address for address in host.network.hosts() if address != host.ip]
        if host.network.prefixlen >= 30
        else []
    )
    if settings.guest is None and len(others) != 1:
        raise InputError(
            f"machine.firecracker.network.guest: expected the guest's address: {host.network} has many",
            hint=f"set it to a free address such as {host.ip + 1}/{host.network.prefixlen}, or to dhcp",
        )
    guest = settings.guest or f"{others[0]}/{host.network.prefixlen}"
    gateway = settings.gateway or (str(host.ip) if host.ip in IPv4Interface(guest).network else None)
    return StaticAddress(guest, gateway, name_servers=settings.name_servers)


def mac_of(guest: StaticAddress | None, name: str) -> str:
    """Return a locally administered MAC address: of the guest's IP address, or of a name."""
    if guest is not None:
        return ":".join(f"{part:02x}" for part in (6, 0, *IPv4Interface(guest.interface).ip.packed))
    return ":".join(["06", *(f"{part:02x}" for part in hashlib.sha256(name.encode()).digest()[:5])])
