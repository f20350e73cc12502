"""KVM is believed in only after a kernel was seen to start under it, and what was seen is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine.qemu.accelerator import Trial, choose
from firebuild_bootstrap.machine.qemu.command import Accelerator, Program, find_program
from firebuild_bootstrap.sandbox import Runtime, Sandbox
from machine_qemu.fake_qemu import fake_qemu

pytestmark = [pytest.mark.needs("userns")]

STARTS = 'echo "Kernel panic - not syncing: VFS: Unable to mount root fs"'
HANGS = "echo starting; exec sleep 60"
DIES = "echo 'KVM: entry failed' >&2; exit 1"


class Host:
    """A host with a clock, and a QEMU that does what `script` says."""

    def __init__(self, directory: Path, sandbox: Sandbox, runtime: Runtime) -> None:
        self._place = (sandbox, runtime)
        self.directory = directory
        self.memory = directory / "kvm.json"
        self.device = directory / "kvm"
        self.kernel = directory / "vmlinuz"
        self.time = 1000.0
        self.device.touch()
        self.kernel.touch()

    def install(self, script: str) -> Program:
        return fake_qemu(self.directory, script)

    def choose(self, seconds: float = 30) -> tuple[Accelerator, str]:
        program = Program(self.directory / "qemu-system-x86_64")
        trial = Trial(*self._place, program, self.kernel, seconds, device=self.device)
        return choose(trial, self.memory, clock=lambda: self.time)


@pytest.fixture
def host(tmp_path: Path, sandbox: Sandbox, runtime: Runtime) -> Host:
    return Host(tmp_path, sandbox, runtime)


def test_where_a_kernel_starts_kvm_is_taken(host: Host) -> None:
    host.install(STARTS)
    assert host.choose() == (Accelerator.KVM, "")


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (HANGS, "a kernel did not start within 1 second"),
        (DIES, "KVM: entry failed"),
        ("exit 3", "QEMU ended with status 3"),
    ],
)
def test_where_none_starts_software_is_taken_and_the_cause_named(host: Host, script: str, why: str) -> None:
    host.install(script)
    found = host.choose(1 if script == HANGS else 30)
    assert found == (Accelerator.TCG, f"not under {host.device}: {why}")


def test_a_success_is_kept_until_the_program_changes(host: Host) -> None:
    host.install(STARTS)
    host.choose()
    kept = host.memory.read_text()
    host.time += 1e9
    assert host.choose() == (Accelerator.KVM, "")
    assert host.memory.read_text() == kept
    host.install(DIES)
    assert host.choose()[0] is Accelerator.TCG
    assert host.memory.read_text() != kept


def test_a_failure_is_tried_again_after_an_hour(host: Host) -> None:
    host.install(DIES)
    host.choose()
    kept = host.memory.read_text()
    host.time += 3599
    host.choose()
    assert host.memory.read_text() == kept
    host.time += 2
    host.choose()
    assert host.memory.read_text() != kept


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_memory_is_no_memory(host: Host, content: str) -> None:
    host.install(STARTS)
    host.memory.write_text(content)
    assert host.choose() == (Accelerator.KVM, "")
    assert host.memory.read_text() != content


def test_a_memory_that_can_not_be_written_is_done_without(host: Host) -> None:
    host.install(STARTS)
    host.memory = host.directory / "gone/kvm.json"
    assert host.choose() == (Accelerator.KVM, "")


def test_without_the_device_nothing_is_tried(host: Host) -> None:
    host.device.unlink()
    assert host.choose() == (Accelerator.TCG, f"there is no {host.device}")
    assert not host.memory.exists()


def test_a_device_that_this_user_may_not_use_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: path != host.device)
    host.device.chmod(0o600)
    accelerator, why = host.choose()
    assert (accelerator, why) == (
        Accelerator.TCG,
        f"this user may not use {host.device}: it is open to root only; "
        f"as root: setfacl -m u:$USER:rw {host.device}",
    )


def test_a_kernel_that_is_gone_is_an_error(tmp_path: Path, sandbox: Sandbox, runtime: Runtime) -> None:
    trial = Trial(sandbox, runtime, fake_qemu(tmp_path, STARTS), tmp_path / "gone")
    with pytest.raises(MachineError, match="gone can't be opened"):
        trial.boot(Accelerator.TCG)


@pytest.mark.xdist_group("qemu")
def test_a_real_kernel_is_seen_to_start(kernel: Path, sandbox: Sandbox, runtime: Runtime) -> None:
    trial = Trial(sandbox, runtime, find_program(), kernel, 100)
    assert trial.boot(Accelerator.TCG, "tsc_early_khz=2600000") == ""
