"""Tap devices: those that exist, and those of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.initramfs import StaticAddress
from firebuild_bootstrap.machine.firecracker import network
from firebuild_bootstrap.machine.firecracker.network import (
    ExistingTap,
    Interface,
    OwnTap,
    find,
    guest_address,
    interfaces,
    ip,
    mac_of,
    tap_owner,
)
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from machine_firecracker.fc_tools import NetworkNamespace
from support import REPO


def interface(name: str, *found: str, up: bool = True, bridge: str = "") -> Interface:
    return Interface(name, tuple(IPv4Interface(one) for one in found), up, bridge)


def existing(*found: Interface, owner: int | None = -1, uid: int = 0, **settings: Any) -> ExistingTap:
    block = NetworkSettings(tap="tap0", **settings)
    return ExistingTap(block, uid=uid, look=lambda: found, owner=lambda _: owner, tun=Path("/dev/null"))


def test_a_tap_with_an_address_says_everything() -> None:
    tap = existing(interface("lo", "127.0.0.1/8"), interface("tap0", "172.16.0.1/30"))
    tap.check()
    link = tap.connect()
    tap.close()
    assert (link.tap, link.host, link.mac, link.namespace) == ("tap0", "172.16.0.1", "06:00:ac:10:00:02", "")
    assert link.guest == StaticAddress("172.16.0.2/30", "172.16.0.1")


def test_a_tap_in_a_bridge_has_the_addresses_of_the_bridge() -> None:
    link = existing(
        interface("br0", "10.0.0.1/24"),
        interface("tap0", bridge="br0"),
        guest="10.0.0.9/24",
        name_servers=["10.0.0.53"],
        mac="06:00:00:00:00:07",
    ).connect()
    assert (link.host, link.mac) == ("10.0.0.1", "06:00:00:00:00:07")
    assert link.guest == StaticAddress("10.0.0.9/24", "10.0.0.1", name_servers=("10.0.0.53",))


def test_the_guest_can_ask_by_dhcp() -> None:
    link = existing(interface("tap0", "10.0.0.1/24"), guest="dhcp").connect()
    assert link.guest is None
    assert link.mac == mac_of(None, "tap0")
    assert link.mac.startswith("06:")


def test_any_address_of_this_host_can_be_the_one_to_call() -> None:
    tap = existing(
        interface("eth0", "192.0.2.1/24"),
        interface("tap0"),
        host="192.0.2.1",
        guest="10.0.0.2/24",
        gateway="10.0.0.1",
    )
    link = tap.connect()
    assert (link.host, link.guest) == ("192.0.2.1", StaticAddress("10.0.0.2/24", "10.0.0.1"))


TAP = interface("tap0", "172.16.0.1/30")


@pytest.mark.parametrize(
    ("tap", "words", "hint"),
    [
        (existing(), "tap: tap0: there is no such interface", "ip tuntap add dev tap0 mode tap"),
        (existing(TAP, owner=None), "tap: tap0: it is not a tap device", "ip tuntap add dev NAME"),
        (existing(TAP, uid=7, owner=8), "user 7 and may not open it: it is user 8's", "mode tap user 7"),
        (existing(interface("tap0", up=False)), "it is down", "ip link set tap0 up"),
        (existing(interface("tap0")), "tap0 has no IPv4 address, nor has its bridge", "ip address add"),
        (existing(interface("tap0"), host="1.2.3.4"), "this host has no address 1.2.3.4", "host:"),
        (
            existing(interface("tap0", "10.0.0.1/24")),
            "guest: expected the guest's address: 10.0.0.0/24 has many",
            "10.0.0.2/24, or to dhcp",
        ),
    ],
)
def test_a_tap_that_cannot_be_used_is_explained(tap: ExistingTap, words: str, hint: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        tap.check()
    assert hint in (caught.value.hint or "")


def test_taps_have_to_be_open_to_the_user(tmp_path: Path) -> None:
    tap = ExistingTap(
        NetworkSettings(tap="tap0"),
        uid=os.geteuid(),
        look=lambda: [TAP],
        owner=lambda _: os.geteuid(),
        tun=tmp_path / "tun",
    )
    with pytest.raises(MachineError, match=r"tun can't be opened by user \d+") as caught:
        tap.check()
    assert "chmod 0666" in (caught.value.hint or "")


@pytest.mark.parametrize(("uid", "owner"), [(7, 7), (7, -1), (0, 8)])
def test_a_tap_of_the_user_or_of_nobody_is_fine(uid: int, owner: int) -> None:
    existing(TAP, uid=uid, owner=owner).check()


def test_in_a_network_of_two_the_guest_is_the_other_one() -> None:
    found = guest_address(NetworkSettings(), IPv4Interface("10.0.0.1/31"))
    assert found == StaticAddress("10.0.0.0/31", "10.0.0.1")


def test_this_host_has_a_loopback_interface_that_is_no_tap() -> None:
    lo = find("lo", interfaces())
    assert lo is not None
    assert IPv4Interface("127.0.0.1/8") in lo.addresses
    assert tap_owner("lo") is None
    assert find("nowhere", interfaces()) is None


def test_trouble_with_ip_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="ip link show nowhere0 failed: "):
        ip("link", "show", "nowhere0")
    monkeypatch.setattr(network, "_SEARCH", "/nowhere")
    with pytest.raises(MachineError, match="the program ip was not found") as caught:
        interfaces()
    assert "iproute2" in (caught.value.hint or "")


def own(folder: Path, name: str = "b1", **settings: Any) -> OwnTap:
    return OwnTap(NetworkSettings(**settings), uid=0, name=name, leftovers=Leftovers(folder))


def test_without_rights_no_tap_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "may_make_taps", lambda: False)
    with pytest.raises(InputError, match="which needs root") as caught:
        own(tmp_path).check()
    assert "machine.firecracker.network.tap" in (caught.value.hint or "")
    monkeypatch.setattr(network, "may_make_taps", lambda: True)
    monkeypatch.setattr(network, "_TUN", tmp_path / "tun")
    with pytest.raises(MachineError, match="tun does not exist") as other:
        own(tmp_path).check()
    assert other.value.hint == "modprobe tun"
    (tmp_path / "tun").touch()
    own(tmp_path).check()


def test_a_user_may_make_taps_with_an_ambient_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (
        ("CapEff:\t3fffffffff\nCapAmb:\t0000000000001000\n", True),
        ("CapAmb:\t0000000000000800\n", False),
        ("Name:\tx\n", False),
    ):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(Path, "read_text", lambda _self, *_, words=words: words)
        assert network.may_make_taps() is expected
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert network.may_make_taps()


def test_own_taps_have_their_addresses_from_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(network, "ip", lambda *words: asked.append(words))
    monkeypatch.setattr(network, "interfaces", list)
    first, second, third = (own(tmp_path, name, pool="198.51.100.0/29") for name in ("a", "b", "c"))
    links = [first.connect(), second.connect()]
    assert {link.host for link in links} == {"198.51.100.1", "198.51.100.5"}
    assert {link.guest.interface for link in links if link.guest} == {"198.51.100.2/30", "198.51.100.6/30"}
    assert all(len(link.tap) < 16 for link in links)
    assert links[0].tap != links[1].tap
    with pytest.raises(MachineError, match=r"pool: all of 198\.51\.100\.0/29 is in use"):
        third.connect()
    first.close()
    first.close()
    assert third.connect().host == links[0].host
    monkeypatch.setattr(network, "interfaces", lambda: [interface("eth0", "198.51.100.2/24")])
    second.close()
    with pytest.raises(MachineError, match="is in use on this host"):
        second.connect()
    third.close()
    assert asked[0] == ("tuntap", "add", "dev", links[0].tap, "mode", "tap", "user", "0")


@pytest.mark.parametrize("wish", [{"host": "198.51.100.1"}, {"guest": "198.51.100.2/30"}])
def test_own_taps_have_no_other_addresses(tmp_path: Path, wish: dict[str, str]) -> None:
    with pytest.raises(InputError, match="host and guest come from pool"):
        own(tmp_path, **wish).check()


SCRIPT = """
import sys
from pathlib import Path
from firebuild_bootstrap.machine.firecracker.network import OwnTap
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.machine.firecracker.network import find, interfaces, tap_owner
from firebuild_bootstrap.machine.leftovers import Leftovers

leftovers = Leftovers(Path(sys.argv[1]))
tap = OwnTap(NetworkSettings(), uid=12345, name="b1", leftovers=leftovers)
tap.check()
link = tap.connect()
made = find(link.tap, interfaces())
assert made.up and str(made.addresses[0].ip) == link.host, made
assert tap_owner(link.tap) == 12345
assert Path(f"/proc/sys/net/ipv6/conf/{link.tap}/disable_ipv6").read_text() == "1\\n"
assert leftovers.clear() == []
assert find(link.tap, interfaces()) is None
"""


@pytest.mark.needs("root")
def test_a_tap_of_our_own_is_made_and_removed(namespace: NetworkNamespace, tmp_path: Path) -> None:
    command = namespace.command(sys.executable, "-c", SCRIPT, tmp_path)
    environ = {**os.environ, "PYTHONPATH": str(REPO / "src")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
