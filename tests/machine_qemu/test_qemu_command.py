"""QEMU's command line, as QEMU itself takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.qemu.command import (
    Accelerator,
    Hardware,
    Program,
    find_program,
    machine_command,
)
from firebuild_bootstrap.sandbox import Bind
from machine_qemu.fake_qemu import fake_qemu


def command(accelerator: Accelerator = Accelerator.TCG) -> str:
    hardware = Hardware(accelerator, 512 << 20, 3)
    program = Program(Path("/usr/bin/qemu"))
    return " ".join(
        machine_command(
            program, hardware, kernel="K", initrd="I", snapshot="S", drives=["D", "E"], append="A B"
        )
    )


def test_the_guest_gets_its_hardware() -> None:
    text = command()
    assert text.startswith("/usr/bin/qemu -M microvm,rtc=on -accel tcg -cpu max -smp 3 -m 512M ")
    assert "-kernel K -append A B -initrd I" in text
    assert "-accel kvm -cpu host" in command(Accelerator.KVM)


def test_a_guest_never_gets_devices_that_nobody_asked_for() -> None:
    text = command()
    assert "-nodefaults" in text
    assert "-no-user-config" in text
    assert "hostfwd" not in text
    assert text.count("-netdev") == 1


def test_the_snapshot_is_read_only_and_comes_first() -> None:
    drives = [word for word in command().split() if "file=" in word]
    assert [word.rpartition("=")[2] for word in drives] == ["S", "D", "E"]
    assert ["readonly=on" in word for word in drives] == [True, False, False]


def test_a_full_disk_does_not_pause_the_machine() -> None:
    assert "werror=report" in command()


def test_qemu_is_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = fake_qemu(tmp_path, "true")
    link = tmp_path / "bin/qemu"
    link.parent.mkdir()
    link.symlink_to(program.path)
    assert find_program(str(link)) == program
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_program("~/bin/qemu") == program
    monkeypatch.setenv("PATH", str(link.parent))
    assert find_program("qemu") == program
    with pytest.raises(
        InputError, match="QEMU was not found: there is no program qemu-system-x86_64"
    ) as error:
        find_program()
    assert "qemu-system-x86" in (error.value.hint or "")


def test_a_sandbox_shows_a_qemu_that_is_somewhere_else(tmp_path: Path) -> None:
    assert Program(Path("/usr/bin/qemu")).binds == ()
    home = tmp_path / "bin"
    home.mkdir()
    program = fake_qemu(home, "true")
    assert list(program.binds) == [Bind(program.path)]
    (tmp_path / "share/qemu").mkdir(parents=True)
    assert list(program.binds) == [Bind(program.path), Bind(tmp_path / "share/qemu")]
