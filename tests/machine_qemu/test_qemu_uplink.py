"""The network of RUN steps leads everywhere but to this host's loopback and link-local addresses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.machine.qemu.namespace import HandedFile, MachineNamespace
from firebuild_bootstrap.machine.qemu.uplink import Uplink, name_servers
from firebuild_bootstrap.machine.usernet import TUN
from firebuild_bootstrap.sandbox import Runtime, Sandbox
from machine_qemu import lonely_host
from machine_qemu.fake_qemu import fake_qemu
from machine_qemu.kernels import require, require_qemu

REACHABLE = ("203.0.113.1", "198.51.100.7")
CLOSED = (
    *("169.254.169.254", "169.254.1.1", "127.0.0.1", "0.0.0.0", "10.0.2.2", "10.0.2.3", "10.0.2.200"),
    *("224.0.0.1", "255.255.255.255"),
)


@pytest.fixture
def tun() -> None:
    require_qemu()
    require(os.access(TUN, os.R_OK | os.W_OK), f"needs {TUN}: modprobe tun")


@pytest.mark.needs("userns", "root")
@pytest.mark.usefixtures("tun")
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_program_in_the_namespace_reaches_what_is_elsewhere_only(kind: str) -> None:
    answers = lonely_host.run("reach", kind, *REACHABLE, *CLOSED)
    assert json.loads(answers) == {**dict.fromkeys(REACHABLE, True), **dict.fromkeys(CLOSED, False)}


@pytest.mark.needs("userns")
def test_a_namespace_without_a_device_says_why(sandbox: Sandbox, runtime: Runtime) -> None:
    with pytest.raises(MachineError, match=r"network could not be made: .*Inappropriate ioctl"):
        MachineNamespace(sandbox, runtime, tun=HandedFile(Path("/dev/null"), writable=True))


@pytest.mark.needs("userns")
def test_an_uplink_that_ended_says_why(sandbox: Sandbox, runtime: Runtime, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    for script, words in (("echo 'no tap' >&2; exit 1", "no tap"), ("exit 3", "status 3")):
        uplink = Uplink(sandbox, runtime, fake_qemu(tmp_path, script), writing)
        assert uplink.wait(60) is not None
        with pytest.raises(MachineError, match=f"the network for RUN steps has ended: {words}"):
            uplink.check()
        uplink.close()
    os.close(writing)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Uplink(sandbox, runtime, fake_qemu(tmp_path, "true"), -1)
    os.close(reading)


def resolv(path: Path, *servers: str) -> Path:
    path.write_text(
        "# made by a test\nsearch example\nnameserver\n" + "".join(f"nameserver {one}\n" for one in servers)
    )
    return path


def test_this_hosts_servers_are_used_but_for_those_on_the_host_itself(tmp_path: Path) -> None:
    first = resolv(tmp_path / "1", "127.0.0.53", "169.254.169.254", "fd00::1")
    second = resolv(tmp_path / "2", "192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3")
    assert name_servers((), (first, second)) == ("192.0.2.1", "192.0.2.2")
    assert name_servers(("192.0.2.9",), (first, second)) == ("192.0.2.9",)
    with pytest.raises(InputError, match="DNS servers are on this host or its link") as error:
        name_servers((), (first, tmp_path / "gone"))
    assert "machine.qemu.name_servers" in (error.value.hint or "")


@pytest.mark.parametrize("server", ["127.0.0.1", "169.254.0.1", "224.0.0.1", "0.0.0.0", "10.0.2.3"])
def test_a_server_that_can_not_be_reached_is_refused(server: str) -> None:
    with pytest.raises(InputError, match=f"the machine can't reach {server}"):
        name_servers(("192.0.2.9", server))
