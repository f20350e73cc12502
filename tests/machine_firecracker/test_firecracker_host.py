"""The installed command with taps, jails and CNI on a real host network, which is one of the tests' own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from machine_firecracker.fc_tools import FirecrackerCli, NetworkNamespace, install, requests, until

pytestmark = [pytest.mark.needs("root"), pytest.mark.needs("bwrap")]
STUCK = "FROM host\nRUN echo ready; sleep 600\n"


class Host:
    """A host with an emulated Firecracker and its jailer, and a network namespace to run firebuild in."""

    def __init__(self, tmp_path: Path, store: Path, programs: Path, namespace: NetworkNamespace) -> None:
        self.tmp_path = tmp_path
        self.namespace = namespace
        self.log = tmp_path / "requests.log"
        self.log.touch()
        self.store = store
        self.firebuild = FirecrackerCli(store, namespace, {"FC_EMULATOR_LOG": str(self.log)})
        self.block: dict[str, Any] = {
            "program": str(programs / "firecracker"),
            "kernel": str(programs / "vmlinux"),
            "memory": "256MiB",
        }
        self.programs = programs
        (tmp_path / "greeting").write_text("hello\n")

    def arguments(self, dockerfile: str = "FROM scratch\nCOPY greeting /\n") -> list[str | Path]:
        config = self.tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"machine": {"disk_size": "200MiB", "firecracker": self.block}}))
        (self.tmp_path / "Dockerfile").write_text(dockerfile)
        arguments: list[str | Path] = [
            "rootfs",
            "--config",
            config,
            "--machine",
            "firecracker",
            "--output",
            "tar",
        ]
        return [*arguments, "--context", self.tmp_path, "--tag", "test/host:1", "--no-cache"]

    def sent(self, path: str) -> Any:
        return next(body for _, method, found, body in requests(self.log) if (method, found) == ("PUT", path))

    def assert_nothing_is_left(self) -> None:
        assert self.namespace.interfaces() == ["lo"]
        assert [path for path in (self.store / "builds").iterdir() if path.is_dir()] == []


@pytest.fixture
def host(tmp_path: Path, store: Path, programs: Path, namespace: NetworkNamespace) -> Host:
    return Host(tmp_path, store, programs, namespace)


def test_a_build_makes_its_own_tap_and_removes_it(host: Host) -> None:
    out, _ = host.firebuild(*host.arguments())
    assert "digest  sha256:" in out
    interface = host.sent("/network-interfaces/eth0")
    assert interface["host_dev_name"].startswith("fb")
    words = host.sent("/boot-source")["boot_args"].split()
    [address] = [word for word in words if word.startswith("ip=172.30.")]
    guest, _, gateway = address.removeprefix("ip=").split(":")[:3]
    assert guest.rpartition(".")[0] == gateway.rpartition(".")[0]
    assert interface["guest_mac"] == "06:00:" + ":".join(f"{int(part):02x}" for part in guest.split("."))
    host.assert_nothing_is_left()


def test_a_tap_that_exists_is_used_and_stays(host: Host) -> None:
    host.namespace.ip("tuntap", "add", "dev", "mytap", "mode", "tap")
    host.namespace.ip("address", "add", "172.16.0.1/30", "dev", "mytap")
    host.block["network"] = {"tap": "mytap"}
    _, err = host.firebuild(*host.arguments(), status=2)
    assert "machine.firecracker.network.tap: mytap: it is down" in err
    host.namespace.ip("link", "set", "mytap", "up")
    host.firebuild(*host.arguments())
    assert host.sent("/network-interfaces/eth0")["host_dev_name"] == "mytap"
    assert host.namespace.interfaces() == ["lo", "mytap"]
    host.block["network"] = {"tap": "lo"}
    _, err = host.firebuild(*host.arguments(), status=2)
    assert "lo: it is not a tap device" in err


@pytest.fixture
def jail(host: Host) -> Iterator[Path]:
    # A short one, for the sake of the socket.
    base = Path(tempfile.mkdtemp(prefix="fbj-", dir="/tmp"))
    host.block["jailer"] = {
        "enabled": True,
        "program": str(host.programs / "jailer"),
        "uid": 12345,
        "gid": 23456,
        "chroot_base": str(base),
    }
    yield base
    shutil.rmtree(base)


def test_a_jail_holds_what_firecracker_sees_and_is_removed(host: Host, jail: Path) -> None:
    host.firebuild(*host.arguments("FROM host\nCOPY greeting /srv/\nRUN cat /srv/greeting\n"))
    boot = host.sent("/boot-source")
    assert (boot["kernel_image_path"], boot["initrd_path"]) == ("/vmlinux", "/initrd")
    paths = [host.sent(f"/drives/drive{number}")["path_on_host"] for number in (0, 1)]
    assert paths == ["/snapshot", "/scratch"]
    assert list((jail / "firecracker").iterdir()) == []
    host.assert_nothing_is_left()


def test_a_jail_whose_socket_would_have_too_long_a_path_is_refused(host: Host, jail: Path) -> None:
    host.block["jailer"]["chroot_base"] = str(jail / ("x" * 80))
    _, err = host.firebuild(*host.arguments(), status=2)
    assert "and a socket's path can have 107" in err
    assert "hint: make machine.firecracker.jailer.chroot_base shorter" in err
    assert list(jail.iterdir()) == []
    assert host.log.read_text() == ""


@pytest.fixture
def cni(host: Host) -> Path:
    for name in ("fb-ptp", "fb-tap"):
        program = install(host.tmp_path / "bin" / name, "fc_cni")
        program.write_text(program.read_text().replace("exec ", f"FB_CNI_NAME={program} exec "))
    document = {
        "name": "fcnet",
        "cniVersion": "1.0.0",
        "plugins": [
            {"type": "fb-ptp", "address": "198.18.7.2/24", "gateway": "198.18.7.1"},
            {"type": "fb-tap"},
        ],
    }
    (host.tmp_path / "net.d").mkdir()
    (host.tmp_path / "net.d/10-fcnet.conflist").write_text(json.dumps(document))
    host.block["network"] = {
        "cni": "fcnet",
        "cni_config": str(host.tmp_path / "net.d"),
        "cni_plugins": [str(host.tmp_path / "bin")],
    }
    return host.tmp_path / "bin/calls.jsonl"


def calls(log: Path, command: str) -> list[str]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["plugin"] for entry in entries if entry["env"]["COMMAND"] == command]


@pytest.mark.parametrize("jailed", [False, True])
def test_a_network_of_cni_connects_the_guest(
    host: Host, cni: Path, jailed: bool, request: pytest.FixtureRequest
) -> None:
    if jailed:
        request.getfixturevalue("jail")
    host.firebuild(*host.arguments())
    assert host.sent("/network-interfaces/eth0") == {
        "iface_id": "eth0",
        "host_dev_name": "tap0",
        "guest_mac": "0a:00:00:00:00:09",
    }
    assert calls(cni, "ADD") == ["fb-ptp", "fb-tap"]
    assert calls(cni, "DEL")[:2] == ["fb-tap", "fb-ptp"]
    host.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["plain", "jailed", "cni"])
def test_nothing_stays_behind_however_firebuild_ends(
    host: Host, kind: str, number: int, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue("jail") if kind == "jailed" else None
    log = request.getfixturevalue("cni") if kind == "cni" else None
    with host.firebuild.popen(*host.arguments(STUCK)) as firebuild:
        assert firebuild.stdout is not None
        for line in firebuild.stdout:
            if "ready" in line and "RUN" not in line:
                break
        [stat] = (host.store / "builds").glob("*/*/firecracker.stat")
        machine = int(stat.read_text().split()[0])
        assert str(machine) in children_of(firebuild.pid)
        os.kill(firebuild.pid, number)  # `ip netns exec` has become the command
        firebuild.stdout.close()
        firebuild.wait(60)
    builds = host.store / "builds"
    until(lambda: not [path for path in builds.iterdir() if path.is_dir()], "the clean-up")
    assert not Path(f"/proc/{machine}").exists() or "Z" in Path(f"/proc/{machine}/stat").read_text()
    host.assert_nothing_is_left()
    if base is not None:
        assert list((base / "firecracker").iterdir()) == []
    if log is not None:
        assert set(calls(log, "DEL")) == {"fb-ptp", "fb-tap"}


def children_of(parent: int) -> list[str]:
    """Return the children of a process, over all of its threads."""
    found: list[str] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def test_what_a_power_cut_left_is_removed_by_the_next_build(host: Host, tmp_path: Path) -> None:
    left = host.store / "builds" / "b-left"
    left.mkdir(mode=0o700)
    jail = tmp_path / "old-jail"
    jail.mkdir()
    host.namespace.ip("tuntap", "add", "dev", "fbold", "mode", "tap")
    entries: list[dict[str, Any]] = [
        {"kind": "directory", "path": str(jail)},
        {"kind": "command", "argv": ["ip", "link", "delete", "fbold"], "text": "", "env": {}, "quiet": False},
    ]
    (left / "leftovers").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    host.firebuild(*host.arguments())
    assert not jail.exists()
    host.assert_nothing_is_left()
