"""A real boot: systemd starts vminit as its service, and what the metadata say takes effect."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest

from agent.conftest import Kernel, alone
from firebuild_bootstrap.agent import EMULATED, Compression, agent_image, kernel_arguments
from firebuild_bootstrap.agent.cpio import write_archive
from firebuild_bootstrap.mmds import InterfaceInfo, MetadataDocument, NetworkInfo, UserInfo
from guest_service.hosting import boot
from guest_service.system import system

pytestmark = [
    pytest.mark.needs("userns"),
    pytest.mark.needs("busybox"),
    pytest.mark.needs("systemd"),
]
NETWORK = "user,id=n0,net=169.254.0.0/16,host=169.254.169.254"
KEY = "ssh-ed25519 " + base64.b64encode(b"x" * 51).decode() + " me"
NASTY = 'it\'s "$HOME" `id` \\ end'
ENTRYPOINT = (
    'echo "$0 $* $(id -u):$(id -g) $(pwd) $GREETING $FROM_IMAGE" > /tmp/said.new; mv /tmp/said.new /tmp/said'
)
# Everything that should have taken effect, between marks, as the machine itself sees it.
REPORT = """
i=0
while [ ! -e /tmp/said ] && [ $i -lt 150 ]; do i=$((i + 1)); sleep 0.2; done
{
    for what in hostname "cat /etc/hostname" "cat /etc/hosts" "cat /etc/profile.d/own.sh" \\
        "cat /home/app/.ssh/authorized_keys" "cat /tmp/said" \\
        "stat -c %a:%u:%g /home/app/.ssh /home/app/.ssh/authorized_keys"
    do
        echo "<<$what>>"
        $what
    done
    . /etc/profile.d/own.sh
    echo "<<variable>>"
    echo "$GREETING"
    echo "<<end>>"
} > /dev/console 2>&1
reboot -f
"""


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


def command(kernel: Kernel, initrd: Path) -> list[str]:
    words = ("panic=-1", "systemd.show_status=0", "systemd.log_target=console", "systemd.log_level=warning")
    return [
        *("qemu-system-x86_64", "-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "512"),
        *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initrd)),
        *("-append", kernel_arguments(extra=[*EMULATED, *words])),
        *("-netdev", NETWORK, "-device", "virtio-net-device,netdev=n0"),
    ]


def test_metadata_take_effect_when_the_machine_boots(kernel: Kernel, store: Path, tmp_path: Path) -> None:
    with alone(store):
        agent = agent_image(store, kernel_modules=[kernel.modules], compression=Compression.ZSTD).read_bytes()
    second = io.BytesIO()
    write_archive(system(REPORT), second)
    (tmp_path / "initrd").write_bytes(agent + bytes(-len(agent) % 4) + second.getvalue())
    status, serial = boot(command(kernel, tmp_path / "initrd"), metadata(), 120)
    found = dict(re.findall(r"<<([^>]+)>>\n(.*?)(?=<<)", serial.replace("\r", ""), re.DOTALL))
    assert status == 0, serial
    assert found["hostname"] == "box.example.org\n", serial
    assert found["cat /etc/hostname"] == "box.example.org\n"
    assert "169.254.0.15 box.example.org box\n" in found["cat /etc/hosts"]
    assert "127.0.0.1 localhost\n" in found["cat /etc/hosts"]
    assert found["variable"] == f"{NASTY}\n"
    assert found["cat /home/app/.ssh/authorized_keys"] == f"{KEY}\n"
    assert found["stat -c %a:%u:%g /home/app/.ssh /home/app/.ssh/authorized_keys"] == (
        "700:1000:1001\n600:1000:1001\n"
    )
    assert found["cat /tmp/said"] == f"called with words 1000:1001 /home/app {NASTY} image\n", serial
