"""What KVM can do here: its own word, and a guest of five bytes."""

from __future__ import annotations

import fcntl
import grp
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine import kvm
from firebuild_bootstrap.machine.kvm import KVM, check_kvm, guest_problem, run_guest


def test_kvm_has_to_exist_and_to_be_open_to_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MachineError, match="kvm does not exist, and Firecracker needs KVM") as caught:
        check_kvm(tmp_path / "kvm")
    assert "the drivers local and qemu do without" in (caught.value.hint or "")
    (tmp_path / "kvm").touch()
    with pytest.raises(MachineError, match="kvm is not a device"):
        check_kvm(tmp_path / "kvm")
    with pytest.raises(MachineError, match="can't be opened: Is a directory"):
        check_kvm(tmp_path)
    with pytest.raises(MachineError, match="opens, but makes no virtual machine: Inappropriate ioctl"):
        check_kvm(Path("/dev/null"))

    def deny(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    for group, mode, hint in [
        (grp.getgrnam("tty").gr_gid, 0o660, "usermod -aG tty $USER"),
        (grp.getgrnam("tty").gr_gid, 0o600, "it is open to root only; as root: setfacl -m"),
        (0, 0o660, "it is open to root only; as root: setfacl -m"),
        (54321, 0o660, "its group 54321 has no name here"),
    ]:
        status = os.stat_result((stat.S_IFCHR | mode, 0, 0, 1, 0, group, 0, 0, 0, 0))
        monkeypatch.setattr(Path, "stat", lambda _, status=status: status)
        with pytest.raises(MachineError, match=r"user .* may not open it") as denied:
            check_kvm(Path("/dev/kvm"))
        assert hint in (denied.value.hint or "")


def test_kvm_has_to_make_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0xAE00: 12}

    def ioctl(_descriptor: int, request: int, _argument: int) -> int:
        return answers[request] if request in answers else os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    check_kvm(Path("/dev/null"))
    answers[0xAE00] = 11
    with pytest.raises(MachineError, match="expected version 12 of the API of KVM, found 11"):
        check_kvm(Path("/dev/null"))


def test_a_guest_that_never_ends_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert guest_problem(0.2) == "nothing of a guest was seen within 0.2 seconds"


def test_a_trial_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert guest_problem() == "/nonexistent/python can't be started: No such file or directory"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert guest_problem() == "status 1"


def test_the_trial_says_what_kvm_refused() -> None:
    with pytest.raises(OSError, match="Inappropriate ioctl"):
        run_guest(Path("/dev/null"))
    script = f"from pathlib import Path; from {kvm.__name__} import run_guest; run_guest(Path('/dev/null'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_a_guest_that_did_something_else_is_not_taken_for_one_that_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of KVM nothing but files: the kernel writes the reason of an exit into memory that both share."""

    def ioctl(_descriptor: int, request: int, _argument: object = 0) -> int:
        if request in {0xAE01, 0xAE41}:
            return os.memfd_create("kvm")
        return 4096 if request == 0xAE04 else 0

    real = os.memfd_create

    def made(name: str) -> int:
        descriptor = real(name)
        os.ftruncate(descriptor, 4096)
        os.pwrite(descriptor, (5).to_bytes(4, "little"), 8)
        return descriptor

    monkeypatch.setattr(os, "memfd_create", made)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(MachineError, match="ended with KVM's exit reason 5"):
        run_guest(Path("/dev/null"))


@pytest.mark.skipif(
    not os.access(KVM, os.R_OK | os.W_OK), reason="there is no KVM here that this user may use"
)
def test_whatever_kvm_is_here_the_trial_ends_with_an_answer() -> None:
    assert guest_problem() in {"", "nothing of a guest was seen within 5 seconds"}


def test_the_trial_takes_no_module_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mmap.py").write_text("open('taken', 'w')\n")
    guest_problem()
    assert os.listdir() == ["mmap.py"]
