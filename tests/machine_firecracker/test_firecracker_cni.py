"""Networks of CNI, with plugins that follow the specification."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import firebuild_bootstrap.machine.firecracker.cni as module
from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.machine.firecracker.cni import CniNetwork, find_config, link_of, tap_and_guest
from firebuild_bootstrap.machine.firecracker.settings import NetworkSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from machine_firecracker.fc_tools import install

PTP = {"type": "fb-ptp", "address": "198.18.7.2/24", "gateway": "198.18.7.1"}


class Cni:
    """A host with CNI: two plugins, and networks to choose from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugins = folder / "bin"
        self.configs = folder / "net.d"
        self.configs.mkdir()
        for name in ("fb-ptp", "fb-tap"):
            program = install(self.plugins / name, "fc_cni")
            text = program.read_text().replace("exec ", f"FB_CNI_NAME={program} exec ")
            program.write_text(text)
        self.leftovers = Leftovers(folder)
        self.name = f"t{os.getpid()}{secrets.token_hex(2)}"

    def write(self, *plugins: dict[str, Any], name: str = "fcnet", file: str = "10-fc.conflist") -> None:
        document = {"name": name, "cniVersion": "1.0.0", "plugins": list(plugins)}
        (self.configs / file).write_text(json.dumps(document))

    def network(self, **settings: Any) -> CniNetwork:
        paths = {"cni_config": str(self.configs), "cni_plugins": (str(self.plugins),)}
        block = NetworkSettings(**({"cni": "fcnet"} | paths | settings))
        return CniNetwork(block, uid=123, gid=456, name=self.name, leftovers=self.leftovers)

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.plugins / "calls.jsonl").read_text().splitlines()]

    def calls_of(self, command: str) -> list[str]:
        return [call["plugin"] for call in self.calls if call["env"]["COMMAND"] == command]


@pytest.fixture
def cni(tmp_path: Path) -> Iterator[Cni]:
    made = Cni(tmp_path)
    yield made
    made.leftovers.clear()


@pytest.mark.needs("root")
def test_each_plugin_is_asked_as_the_specification_says(cni: Cni) -> None:
    cni.write({**PTP, "capabilities": {"portMappings": True}}, {"type": "fb-tap", "mtu": 9000})
    network = cni.network()
    network.check()
    link = network.connect()
    network.close()
    namespace = f"/run/netns/firebuild-{cni.name}"
    assert link.namespace == namespace
    assert (link.tap, link.host, link.mac) == ("tap0", "198.18.7.1", "0a:00:00:00:00:09")
    assert link.guest is not None
    assert (link.guest.interface, link.guest.gateway) == ("198.18.7.2/24", "198.18.7.1")
    assert link.guest.name_servers == ("192.0.2.53",)
    first, second = cni.calls
    for call in (first, second):
        assert call["env"] == {
            "COMMAND": "ADD",
            "CONTAINERID": f"firebuild-{cni.name}",
            "NETNS": namespace,
            "IFNAME": "eth0",
            "ARGS": "IgnoreUnknown=1;TC_REDIRECT_TAP_UID=123;TC_REDIRECT_TAP_GID=456",
            "PATH": str(cni.plugins),
        }
        assert (call["config"]["name"], call["config"]["cniVersion"]) == ("fcnet", "1.0.0")
    assert "prevResult" not in first["config"]
    assert "capabilities" not in first["config"]
    assert second["config"]["mtu"] == 9000
    assert second["config"]["prevResult"]["ips"][1]["address"] == "198.18.7.2/24"
    assert cni.leftovers.clear() == []
    assert cni.calls_of("DEL")[:2] == ["fb-tap", "fb-ptp"]
    deletion = next(call for call in cni.calls if call["env"]["COMMAND"] == "DEL")
    assert deletion["config"]["prevResult"]["interfaces"][-1]["mac"] == "0a:00:00:00:00:09"
    assert not os.path.exists(namespace)
    assert cni.leftovers.clear() == []


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ({"broken": "ADD"}, "try again later the moon is in the wrong place"),
        ({"silent": "ADD"}, "could not add the network .*out of words\n  hint: run it by hand"),
        ({"override": {"ips": []}}, "the plugins gave no IPv4 address\n  hint: .*ipam"),
        ({"override": {"interfaces": []}}, "the plugins made no tap device"),
        ({"override": {"ips": [{"address": "198.18.7.2/24"}]}}, "the plugins named no gateway"),
    ],
)
def test_a_plugin_that_fails_is_named_and_everything_is_taken_back(
    cni: Cni, habit: dict[str, Any], words: str
) -> None:
    cni.write(PTP, {"type": "fb-tap", **habit})
    with pytest.raises(MachineError, match=words):
        cni.network().connect()
    assert cni.leftovers.clear() == []
    assert {"fb-tap", "fb-ptp"} == set(cni.calls_of("DEL"))
    assert not os.path.exists(f"/run/netns/firebuild-{cni.name}")


@pytest.mark.needs("root")
def test_a_plugin_that_cannot_be_run_or_cannot_delete_is_an_error(cni: Cni) -> None:
    (cni.plugins / "odd").write_bytes(b"\x7fELF")
    (cni.plugins / "odd").chmod(0o755)
    cni.write({"type": "odd"})
    with pytest.raises(
        MachineError,
        match=r"machine\.firecracker\.network\.cni: the plugin .*odd can't be started: Exec format error",
    ):
        cni.network().connect()
    cni.leftovers.clear()
    cni.write({**PTP, "broken": "DEL"}, {"type": "fb-tap"})
    cni.network().connect()
    [problem] = cni.leftovers.clear()
    assert "fb-ptp failed: " in problem
    assert "try again later" in problem


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("yes", "it wrote more than 1048576 bytes"),
        ("yes >&2", "it wrote more than 1048576 bytes"),
        ("sleep 600", "it did not end within 1 second"),
    ],
)
def test_a_plugin_that_goes_on_for_ever_is_ended_and_everything_is_taken_back(
    cni: Cni, script: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(module, "_SECONDS", 1)
    plugin = cni.plugins / "endless"
    plugin.write_text(f'#!/bin/sh\n[ "$CNI_COMMAND" = DEL ] || {script}\n')
    plugin.chmod(0o755)
    cni.write({"type": "endless"})
    with pytest.raises(MachineError, match=f"the plugin {plugin} failed: {words}"):
        cni.network().connect()
    assert cni.leftovers.clear() == []
    assert not os.path.exists(f"/run/netns/firebuild-{cni.name}")


@pytest.mark.needs("root")
def test_settings_beat_what_the_plugins_say(cni: Cni) -> None:
    cni.write(PTP, {"type": "fb-tap"})
    link = cni.network(
        host="198.18.7.1", guest="198.18.7.77/24", mac="06:00:00:00:00:01", name_servers=["192.0.2.99"]
    ).connect()
    assert link.guest is not None
    assert (link.guest.interface, link.guest.gateway, link.mac) == (
        "198.18.7.77/24",
        "198.18.7.1",
        "06:00:00:00:00:01",
    )
    assert link.guest.name_servers == ("192.0.2.99",)
    assert cni.leftovers.clear() == []
    assert cni.network(guest="dhcp").connect().guest is None


def test_only_root_can_use_networks_of_cni(cni: Cni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="networks of CNI need root"):
        cni.network().check()


def test_a_missing_plugin_is_noticed_before_anything_is_made(
    cni: Cni, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for plugin in ({"type": "nowhere"}, {"type": ""}, {}, {"type": f"..{cni.plugins}/fb-ptp"}):
        cni.write(PTP, plugin)
        with pytest.raises(
            InputError, match=r"machine\.firecracker\.network\.cni: the plugin '.*' was not found in /"
        ) as caught:
            cni.network().check()
        assert "cni_plugins" in (caught.value.hint or "")


def test_networks_and_plugins_may_be_below_the_home_directory(
    cni: Cni, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HOME", str(cni.folder))
    cni.write(PTP)
    cni.network(cni_config="~/net.d", cni_plugins=("~/bin",)).check()


def test_networks_are_found_by_name_in_the_order_of_the_files(cni: Cni) -> None:
    cni.write({"type": "second"}, file="20.conflist")
    cni.write({"type": "other"}, name="other", file="05.conflist")
    (cni.configs / "10.conf").write_text(json.dumps({"name": "fcnet", "type": "first", "mtu": 1}))
    (cni.configs / "readme.txt").write_text("no network")
    found = find_config(cni.configs, "fcnet")
    assert (found.version, found.plugins) == ("0.3.1", ({"type": "first", "mtu": 1},))
    assert find_config(cni.configs, "other").version == "1.0.0"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "10.conf is not a JSON object"),
        ("[]", "10.conf is not a JSON object"),
        ('{"name": "fcnet", "plugins": {}}', "expected a list of objects in plugins"),
        ('{"name": "fcnet", "plugins": ["x"]}', "expected a list of objects in plugins"),
        ("\xff", "10.conf can't be read"),
        ('{"name": "other"}', r"there is no network 'fcnet' in .*\n.*it has other"),
    ],
)
def test_a_network_that_cannot_be_read_is_an_error(cni: Cni, text: str, words: str) -> None:
    (cni.configs / "10.conf").write_text(text, "latin-1")
    with pytest.raises(InputError) as caught:
        find_config(cni.configs, "fcnet")
    assert re.search(words, str(caught.value))


def test_no_networks_at_all_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no network 'x'"):
        find_config(tmp_path, "x")
    with pytest.raises(
        InputError, match=r"machine\.firecracker\.network\.cni_config: .*/none can't be read: No such file"
    ):
        find_config(tmp_path / "none", "x")


def test_the_tap_is_the_one_that_is_paired_with_the_guest() -> None:
    def interface(name: str, sandbox: str = "") -> dict[str, str]:
        return {"name": name, "sandbox": sandbox}

    pair = [interface("tap1", "/ns"), interface("tap1", "c")]
    result: dict[str, Any] = {"interfaces": [interface("host0"), interface("eth0", "/ns"), *pair]}
    assert tap_and_guest(result, "/ns", "c") == (pair[0], pair[1])
    result["interfaces"] = [interface("eth0", "/ns"), interface("tap2", "/ns"), interface("x", "c"), {}, 7]
    assert tap_and_guest(result, "/ns", "c") == (interface("tap2", "/ns"), {})
    result["interfaces"] = [interface("eth0", "/ns")]
    with pytest.raises(FirebuildError, match="made no tap device") as caught:
        tap_and_guest(result, "/ns", "c")
    assert "tc-redirect-tap" in (caught.value.hint or "")


@pytest.mark.needs("root")
def test_a_namespace_that_is_in_the_way_is_an_error(cni: Cni) -> None:
    cni.write(PTP, {"type": "fb-tap"})
    subprocess.run(["ip", "netns", "add", f"firebuild-{cni.name}"], check=True)
    with pytest.raises(MachineError, match=r"ip netns add firebuild-.* failed: .*File exists"):
        cni.network().connect()


@pytest.mark.parametrize(
    "result",
    [
        {"interfaces": 1},
        {"interfaces": [{"name": "tap0", "sandbox": "/n"}], "ips": [1]},
        {"interfaces": [{"name": "tap0", "sandbox": "/n"}], "ips": [{"address": "x"}]},
        {"interfaces": [{"name": "tap0", "sandbox": "/n"}], "ips": {"address": "10.0.0.2/24"}},
        {
            "interfaces": [{"name": "tap0", "sandbox": "/n"}],
            "ips": [{"address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
            "dns": [1],
        },
    ],
)
def test_a_malformed_result_of_a_plugin_is_named(result: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match="the result of the plugins is malformed"):
        link_of(result, NetworkSettings(cni="net"), "/n", "x")
