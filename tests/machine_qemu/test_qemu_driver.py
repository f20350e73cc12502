"""What the driver makes of a QEMU that does one thing or another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.machine.kvm import KVM
from firebuild_bootstrap.machine.qemu import driver
from firebuild_bootstrap.machine.qemu.command import Accelerator
from firebuild_bootstrap.machine.qemu.driver import QemuMachine, qemu_machine
from firebuild_bootstrap.machine.qemu.settings import QemuSettings
from firebuild_bootstrap.machine.settings import MachineSettings
from firebuild_bootstrap.machine.usernet import TUN
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import detect
from machine_qemu.fake_qemu import fake_qemu
from machine_qemu.kernels import bzimage, require

pytestmark = [pytest.mark.needs("userns", "e2fsck"), pytest.mark.xdist_group("qemu")]

REPORT = 'firebuild-initramfs: {"version": 1, "status": "%s", "exit": %s, "message": "%s"}'
SUCCESS = f"echo '{REPORT % ('success', 0, '')}'"
SILENT = "the machine ended without a report"
Make = Callable[..., QemuMachine]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that keeps the initramfs for all tests."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, store: Path, notes: list[str]) -> Iterator[Make]:
    """Makes a machine whose QEMU is a script; its kernel has everything built in."""
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(bzimage("0.0.1-test"))
    made: list[QemuMachine] = []
    workspaces: list[Workspace] = []

    def make(script: str, **settings: object) -> QemuMachine:
        program = fake_qemu(tmp_path, script)
        block = {"program": str(program.path), "kernel": str(kernel), "accelerator": "tcg", **settings}
        machine = MachineSettings(driver="qemu", qemu=QemuSettings.model_validate(block))
        workspace = Workspace(tmp_path / "home", f"build-{len(workspaces)}", detect())
        workspaces.append(workspace)
        made.append(qemu_machine(machine, workspace, store=store, notice=notes.append))
        return made[-1]

    yield make
    for machine in made:
        machine.close()
        machine.close()
    for workspace in workspaces:
        workspace.close()


def run(machine: QemuMachine) -> None:
    """Start it and wait for its end."""
    listening = machine.listen()
    listening.listener.close()
    machine.prepare([])
    machine.start()
    assert machine.wait(60) is not None


def test_before_its_start_a_machine_has_not_ended(make: Make) -> None:
    machine = make("true")
    assert (machine.poll(), machine.stop()) == (None, None)
    with pytest.raises(MachineError, match="the machine has no network yet"):
        machine.start()
    machine.listen().listener.close()
    assert (machine.poll(), machine.stop()) == (None, None)


def test_the_guest_dials_the_metadata_services_address(make: Make) -> None:
    listening = make("true").listen()
    port = listening.listener.getsockname()[1]
    assert listening.host_port == f"169.254.169.254:{port}"


@pytest.mark.parametrize(
    ("script", "code", "log"),
    [
        (SUCCESS, 0, ""),
        (f"echo '{REPORT % ('failed', 7, 'the words')}'", 7, "the words"),
        (f"echo '{REPORT % ('drive', 'null', 'no drive')}'", 70, "no drive"),
        ("echo 'bad option' >&2; exit 1", 1, f"{SILENT}; its last output: bad option"),
        ("echo boot; exit 0", 70, f"{SILENT}; its last output: boot"),
        ("kill -9 $$", 137, SILENT),
    ],
)
def test_the_end_is_what_the_initramfs_reported(make: Make, script: str, code: int, log: str) -> None:
    machine = make(script)
    run(machine)
    ended = machine.poll()
    assert ended is not None
    assert (ended.code, ended.log) == (code, log)


WITH_KVM = pytest.mark.skipif(not os.access(KVM, os.R_OK | os.W_OK), reason=f"{KVM} can't be opened")


@pytest.mark.parametrize(
    ("script", "settings", "words"),
    [
        pytest.param(
            "sleep 60",
            {"accelerator": "kvm"},
            "has not run one instruction. Most likely /dev/kvm opens here",
            marks=WITH_KVM,
        ),
        ("sleep 60", {"accelerator": "tcg"}, "is machine.qemu.kernel a kernel that QEMU's microvm boots"),
        ("sleep 60", {"accelerator": "tcg", "kernel_args": ["console=none"]}, ""),
        pytest.param("echo boot; sleep 60", {"accelerator": "kvm"}, "", marks=WITH_KVM),
    ],
)
def test_an_empty_console_is_explained(
    make: Make, script: str, settings: dict[str, object], words: str
) -> None:
    machine = make(script, **settings)
    machine.listen().listener.close()
    assert machine.silence() == ""
    machine.prepare([])
    machine.start()
    machine.wait(1)
    assert words in machine.silence()
    assert bool(words) == bool(machine.silence())
    assert machine.stop(grace=0) is not None


def test_a_guest_that_is_about_to_end_has_the_time_for_it(make: Make) -> None:
    machine = make(f"sleep 1; {SUCCESS}")
    machine.listen().listener.close()
    machine.prepare([])
    machine.start()
    ended = machine.stop(grace=60)
    assert ended is not None
    assert ended.code == 0


def test_the_machine_is_started_as_the_settings_say(make: Make, tmp_path: Path) -> None:
    log = tmp_path / "serial"
    machine = make('echo "$@"', vcpus=3, memory="300MiB", kernel_args=["loglevel=7"], serial_log=str(log))
    run(machine)
    words = log.read_text()
    assert "-smp 3 -m 300M " in words
    assert " tsc_early_khz=2600000 loglevel=7 " in words
    assert " ip=169.254.0.15:::255.255.0.0:::off " in words
    assert "nameserver" not in words


def test_a_machine_whose_drive_is_broken_by_the_host_is_ended(make: Make, notes: list[str]) -> None:
    machine = make("echo 'I/O error, dev vdb, sector 8 op 0x1:(WRITE)'; exec sleep 60")
    machine.listen().listener.close()
    machine.prepare([])
    machine.start()
    deadline = time.monotonic() + 60
    while (ended := machine.wait(0.1)) is None:
        assert time.monotonic() < deadline
    assert ended.code == 137
    assert ended.log.startswith("this host failed to write to a drive of the machine: is the disk of /")
    assert notes == []
    machine.close()
    assert notes == [ended.log]


def test_the_accelerator_is_tried_unless_it_is_chosen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"auto": "because", "tcg": "", "kvm": ""}
    monkeypatch.setattr(driver, "choose", lambda *_: (Accelerator.TCG, "because"))
    for setting, why in found.items():
        machine = make(SUCCESS, accelerator=setting)
        notes = machine.prepare([])
        assert notes == ((f"the machine runs in software and is slow: {why} (docs/qemu.md)",) if why else ())
        machine.close()


def test_a_step_without_a_network_is_told_the_setting(make: Make) -> None:
    assert (
        make("exit 1").no_network() == "the machine has no network: machine.qemu.network: user gives it one"
    )


def test_a_machine_with_a_network_has_a_gateway_and_name_servers(make: Make, tmp_path: Path) -> None:
    require(os.access(TUN, os.R_OK | os.W_OK), f"needs {TUN}: modprobe tun")
    script = 'echo "$@"; case "$*" in *"-M none"*) exec sleep 60;; esac'
    log = tmp_path / "serial"
    machine = make(script, network="user", name_servers=["192.0.2.53"], serial_log=str(log))
    run(machine)
    assert " ip=169.254.0.15::169.254.169.254:255.255.0.0:::off:192.0.2.53 " in log.read_text()
    assert "machine.qemu.name_servers" in machine.no_network()


def test_a_machine_whose_network_has_ended_does_not_start(make: Make) -> None:
    require(os.access(TUN, os.R_OK | os.W_OK), f"needs {TUN}: modprobe tun")
    machine = make("echo no tap; exit 1", network="user", name_servers=["192.0.2.53"])
    machine.listen().listener.close()
    assert machine._uplink is not None
    machine._uplink.wait(60)
    with pytest.raises(MachineError, match="the network for RUN steps has ended: no tap"):
        machine.start()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel": "/etc/passwd"}, "is not a Linux kernel"),
        ({"program": "no-such-qemu"}, "no program no-such-qemu"),
        ({"serial_log": "/no/such/log"}, "serial_log: /no/such/log can't be written"),
        ({"network": "user", "name_servers": ["127.0.0.1"]}, "can't reach 127.0.0.1"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(driver, "check_tun", lambda *_: None)
    with pytest.raises(InputError, match=words):
        make("true", **settings)


@pytest.mark.parametrize("server", ["fd00::1", "dns.example", "1.2.3"])
def test_name_servers_are_ipv4_addresses(server: str) -> None:
    with pytest.raises(ValueError, match="expected an IPv4 address such as"):
        QemuSettings.model_validate({"name_servers": [server]})
