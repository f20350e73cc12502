"""The network of a machine, tried on the loopback interface of a namespace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from firebuild_bootstrap.guest import init_network
from firebuild_bootstrap.guest.init_settings import InitError

_NETWORK = """
import json, sys
from firebuild_bootstrap.guest import init_network
from firebuild_bootstrap.guest.init_settings import InitError
from firebuild_bootstrap.guest.init_network import bring_up
from firebuild_bootstrap.guest.init_settings import parse_ip
init_network._ATTEMPT_SECONDS = (0.1, 0.1)
ip, host, resolv_conf = sys.argv[1:]
error = ""
try:
    bring_up(parse_ip(ip), host, resolv_conf=resolv_conf)
    bring_up(parse_ip(ip), host, resolv_conf=resolv_conf)
except InitError as failed:
    error = f"{failed.status}: {failed.message}"
print(json.dumps([error, [line.split()[:8] for line in open("/proc/net/route")][1:]]))
"""


def network(ip: str, host: str, resolv_conf: Path, program: str = _NETWORK) -> tuple[str, list[list[str]]]:
    """Bring up loopback as if it were a network card, twice, in a namespace of its own."""
    done = subprocess.run(
        [
            "unshare",
            "--user",
            "--map-root-user",
            "--net",
            sys.executable,
            "-c",
            program,
            ip,
            host,
            resolv_conf,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    error, routes = json.loads(done.stdout)
    return error, routes


@pytest.mark.needs("userns")
def test_addresses_routes_and_name_servers_are_set_and_may_be_there_already(tmp_path: Path) -> None:
    ip = "10.0.0.2::10.9.9.9:255.255.255.0::lo:off:1.1.1.1:9.9.9.9"
    error, routes = network(ip, "169.254.169.254", tmp_path / "etc/resolv.conf")
    assert error == ""
    assert (tmp_path / "etc/resolv.conf").read_text() == "nameserver 1.1.1.1\nnameserver 9.9.9.9\n"
    # Interface, destination, gateway (both little-endian), flags, …, mask
    found = {(route[1], route[2], route[3]) for route in routes}
    assert ("00000000", "0909090A", "0003") in found
    assert ("0909090A", "00000000", "0005") in found
    assert ("FEA9FEA9", "00000000", "0005") in found


@pytest.mark.needs("userns")
@pytest.mark.parametrize("host", ["metadata.example", "127.0.0.1", "[fd00"])
def test_only_an_address_elsewhere_gets_a_route(tmp_path: Path, host: str) -> None:
    error, routes = network("10.0.0.2:::255.255.255.0::lo:off", host, tmp_path / "resolv.conf")
    assert (error, [route for route in routes if route[7] == "FFFFFFFF"]) == ("", [])
    assert not (tmp_path / "resolv.conf").exists()


@pytest.mark.needs("userns")
def test_what_the_kernel_refuses_is_told_with_the_interface(tmp_path: Path) -> None:
    error, _ = network("10.0.0.2::224.0.0.1:255.255.255.0::lo:off", "127.0.0.1", tmp_path / "r")
    assert error.startswith("network: lo can't be configured: ")


_SERVER = """
import socket, threading
from firebuild_bootstrap.guest import init_network
def serve(server, script):
    for kind, transaction in script:
        packet, client = server.recvfrom(4096)
        number = int.from_bytes(packet[4:8], "big") + transaction
        options = {53: bytes([kind]), 1: bytes([255, 255, 255, 0])}
        if kind == 2:
            options[54] = bytes([127, 0, 0, 1])
        server.sendto(init_network.encode(2, number, packet[28:34], options, bytes([10, 0, 0, 9])), client)
up = init_network.Interface.set_up
def set_up(interface):
    up(interface)
    if not hasattr(init_network, "server"):
        init_network.server = server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        server.bind(("", 67))
        script = [(5, 0), (2, 1), (2, 0), (6, 0), (2, 0), (5, 0), (2, 0), (5, 0)]
        threading.Thread(target=serve, args=(server, script), daemon=True).start()
init_network.Interface.set_up = set_up
init_network._ATTEMPT_SECONDS = (0.3, 0.3, 5.0, 5.0)
"""


@pytest.mark.needs("userns")
def test_dhcp_is_tried_again_after_nonsense_silence_and_refusal(tmp_path: Path) -> None:
    """A wrong kind, somebody else's offer, an offer that is withdrawn, and at last a lease."""
    program = _NETWORK.replace("error = ", f"{_SERVER}\nerror = ", 1)
    error, routes = network(":::::lo:dhcp", "169.254.169.254", tmp_path / "r", program)
    assert error == ""
    assert "FEA9FEA9" in {route[1] for route in routes}


def test_a_missing_interface_is_told(tmp_path: Path) -> None:
    for name, words in (("eth7", "interface eth7"), ("", "network interface")):
        with pytest.raises(InitError, match=f"there is no {words} after 0.1 seconds"):
            init_network._device(name, str(tmp_path / "none"), 0.1)
    for name in ("lo", "eth1", "eth0"):
        (tmp_path / name).mkdir()
    assert init_network._device("", str(tmp_path), 0.1) == "eth0"
    assert init_network._device("eth1", str(tmp_path), 0.1) == "eth1"


@pytest.mark.needs("userns")
def test_a_silent_dhcp_server_is_told(tmp_path: Path) -> None:
    error, _ = network(":::::lo:dhcp", "127.0.0.1", tmp_path / "r")
    assert error == "network: no DHCP server answered on lo in 0.2 seconds"
