"""Real boots: systemd or OpenRC starts vminit as its service, and what the metadata say takes effect."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from firebuild_bootstrap.initramfs import EMULATED, Compression, initramfs_image, kernel_arguments
from firebuild_bootstrap.initramfs.cpio import Entry, file, write_archive
from firebuild_bootstrap.mmds import InterfaceInfo, MetadataDocument, NetworkInfo, UserInfo
from guest_service.hosting import boot
from guest_service.openrc import openrc
from guest_service.system import Manager, system
from guest_service.systemd import systemd
from initramfs.conftest import Kernel, alone

pytestmark = [pytest.mark.needs("userns"), pytest.mark.needs("busybox")]
NETWORK = "user,id=n0,net=169.254.0.0/16,host=169.254.169.254"
KEY = "ssh-ed25519 " + base64.b64encode(b"x" * 51).decode() + " me"
NASTY = 'it\'s "$HOME" `id` \\ end'
SAY = (
    'echo "$0 $* $(id -u):$(id -g) $(pwd) $GREETING $FROM_IMAGE" > /tmp/said.new; mv /tmp/said.new /tmp/said'
)
ENTRYPOINT = f"echo out; echo err >&2; {SAY}; exec sleep 1000"
FLAGS = "--mmds-timeout=20 --environment-file=/etc/profile.d/own.sh"
# Everything that should have taken effect, as the machine itself sees it.
QUESTIONS = {
    "wait": "i=0; while [ ! -e /tmp/said ] && [ $i -lt 150 ]; do i=$((i + 1)); sleep 0.2; done",
    "said": "cat /tmp/said",
    "name": "hostname",
    "hostname": "cat /etc/hostname",
    "hosts": "cat /etc/hosts",
    "keys": "cat /home/app/.ssh/authorized_keys",
    "modes": "stat -c %a:%u:%g /home/app/.ssh /home/app/.ssh/authorized_keys",
    "variable": '. /etc/profile.d/own.sh; echo "$GREETING"',
}
LOG, PID = "/var/log/vminit-entrypoint.log", "/run/vminit-entrypoint.pid"
SERVICE = "rc-service -q vminit-entrypoint"
OPENRC_QUESTIONS = {
    "sshd": "cat /run/sshd-saw",
    "log": f"stat -c %a:%u:%g {LOG}; cat {LOG}",
    "restart": f"read old < {PID}; {SERVICE} restart; echo $?; read new < {PID}",
    "running": "kill -0 $old || echo old is gone; kill -0 $new && echo new is there",
    "stop": f"kill -9 $new; while kill -0 $new; do sleep 0.1; done; {SERVICE} stop; echo $?",
}


@dataclass(frozen=True)
class Booted:
    """What a machine said: all of it, and the answers to questions."""

    serial: str
    answers: Mapping[str, str]


class Machines:
    """Boots machines; what they should say is asked for in shell, by name."""

    def __init__(self, kernel: Kernel, initramfs: bytes, folder: Path) -> None:
        self._kernel = kernel
        self._initramfs = initramfs
        self._initrd = folder / "initrd"

    def boot(
        self, manager: Manager, flags: str, questions: Mapping[str, str], more: Iterable[Entry] = ()
    ) -> Booted:
        archive = io.BytesIO()
        write_archive([*system(manager, f'VMINIT_FLAGS="{flags}"\n', _report(questions)), *more], archive)
        self._initrd.write_bytes(self._initramfs + bytes(-len(self._initramfs) % 4) + archive.getvalue())
        status, serial = boot(self._command(manager.words), metadata(), 240)
        assert status == 0, serial
        serial = serial.replace("\r", "")
        return Booted(serial, dict(re.findall(r"<<(\w+)>>\n(.*?)(?=<<)", serial, re.DOTALL)))

    def _command(self, words: Iterable[str]) -> list[str]:
        arguments = kernel_arguments(extra=[*EMULATED, "panic=-1", *words])
        return [
            *("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "512"),
            *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
            *("-kernel", str(self._kernel.image), "-initrd", str(self._initrd)),
            *("-append", arguments, "-netdev", NETWORK, "-device", "virtio-net-device,netdev=n0"),
        ]


def _report(questions: Mapping[str, str]) -> str:
    asked = [f"echo {shlex.quote(f'<<{name}>>')}\n{question}\n" for name, question in questions.items()]
    return f"trap 'reboot -f' EXIT\n{{\n{''.join(asked)}echo '<<end>>'\n}} > /dev/console 2>&1\n"


@pytest.fixture
def machines(kernel: Kernel, store: Path, tmp_path: Path) -> Machines:
    with alone(store):
        initramfs = initramfs_image(store, kernel_modules=[kernel.modules], compression=Compression.NONE)
    return Machines(kernel, initramfs.read_bytes(), tmp_path)


def metadata() -> dict[str, object]:
    entrypoint = {
        "EntryPoint": ["/bin/sh", "-c", ENTRYPOINT],
        "Cmd": ["called", "with words"],
        "Env": {"FROM_IMAGE": "image"},
        "Workdir": "/home/app",
        "User": "1000:1001",
    }
    document = MetadataDocument(
        local_hostname="box.example.org",
        env={"GREETING": NASTY},
        entrypoint_json=json.dumps(entrypoint),
        network=NetworkInfo(interfaces={"52:54:00:12:34:56": InterfaceInfo(ip="169.254.0.15/16")}),
        users={"app": UserInfo(ssh_keys=KEY)},
    )
    return document.to_json()


def check(booted: Booted) -> None:
    found = booted.answers
    assert found["name"] == found["hostname"] == "box.example.org\n", booted.serial
    assert "169.254.0.15 box.example.org box\n" in found["hosts"]
    assert "127.0.0.1 localhost\n" in found["hosts"]
    assert found["variable"] == f"{NASTY}\n"
    assert found["keys"] == f"{KEY}\n"
    assert found["modes"] == "700:1000:1001\n600:1000:1001\n"
    assert found["said"] == f"called with words 1000:1001 /home/app {NASTY} image\n", booted.serial


@pytest.mark.needs("systemd")
def test_metadata_take_effect_when_systemd_starts_the_machine(machines: Machines) -> None:
    check(machines.boot(systemd(), FLAGS, QUESTIONS))


@pytest.mark.needs("openrc")
def test_metadata_take_effect_when_openrc_starts_the_machine(machines: Machines) -> None:
    booted = machines.boot(openrc(), FLAGS, QUESTIONS | OPENRC_QUESTIONS)
    check(booted)
    found = booted.answers
    assert found["sshd"] == "box.example.org\n", booted.serial
    assert found["log"] == "640:0:0\nout\nerr\n"
    assert found["restart"].endswith("0\n"), booted.serial
    assert found["running"].endswith("old is gone\nnew is there\n"), booted.serial
    # It had ended before it was stopped.
    assert found["stop"].endswith("\n0\n"), booted.serial


@pytest.mark.needs("openrc")
def test_openrc_says_that_vminit_failed_and_starts_no_entrypoint(machines: Machines) -> None:
    nobody = "--mmds=http://169.254.169.254:81 --mmds-timeout=1"
    services = {"configuring": "vminit", "entrypoint": "vminit-entrypoint"}
    states = {name: f"rc-service {service} status" for name, service in services.items()}
    old = file("bin/firebuild-entrypoint", b"#!/bin/sh\n> /tmp/said\n", 0o755)
    booted = machines.boot(openrc(), nobody, {**states, "files": "ls /tmp"}, [old])
    assert "http://169.254.169.254:81" in booted.serial
    assert "ERROR: vminit failed to start" in booted.serial
    assert "cannot start vminit-entrypoint as vminit would not start" in booted.serial
    assert "status: stopped" in booted.answers["configuring"]
    assert "status: stopped" in booted.answers["entrypoint"]
    assert booted.answers["files"] == ""
