"""What is checked before anything starts, and what is said when it is not right."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.initramfs.modules import module_directories
from firebuild_bootstrap.machine import kvm
from firebuild_bootstrap.machine.firecracker import checks
from firebuild_bootstrap.machine.firecracker.api import ApiError, FirecrackerApi, start
from firebuild_bootstrap.machine.firecracker.checks import (
    check_kernel,
    check_socket_path,
    check_version,
    find_program,
    program_version,
)
from firebuild_bootstrap.machine.firecracker.driver import firecracker_machine
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.settings import load_settings
from firebuild_pki import SettingsError
from machine_firecracker.fc_tools import ended, kernel_file, until

BLOCK = "machine.firecracker"


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_program_is_found_on_path_or_where_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script(tmp_path / "firecracker", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("firecracker", "x") == made
    assert find_program(str(made), "x") == made
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_program("~/firecracker", "x") == made
    with pytest.raises(InputError, match="setting: the program jailer was not found"):
        find_program("jailer", "setting")
    made.chmod(0o644)
    with pytest.raises(InputError, match=r"setting: .*/firecracker is not executable") as caught:
        find_program(str(made), "setting")
    assert "chmod +x" in (caught.value.hint or "")


def test_kernel_modules_may_be_below_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "modules").mkdir()
    assert module_directories(["~/modules"], "kernel_modules") == (tmp_path / "modules",)
    with pytest.raises(InputError, match=rf"kernel_modules: {tmp_path}/none is not a directory"):
        module_directories(["~/none"], "kernel_modules")


@pytest.mark.parametrize("text", ["Firecracker v1.13.1\n\nmore 9.9.9", "1.0.0", "Jailer v1.7.0-dev"])
def test_today_s_versions_are_known(text: str) -> None:
    assert check_version(text, "x")[0] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Firecracker v0.25.2", "expected Firecracker 1.0 or a later 1.x, found v0.25.2, which is too old"),
        ("Firecracker v2.0.0", "expected Firecracker 1.0 or a later 1.x, found v2.0.0"),
        ("QEMU", "and its version is unknown: it says 'QEMU'"),
        ("", "and its version is unknown: it says ''"),
    ],
)
def test_old_and_unknown_versions_are_refused(text: str, words: str, tmp_path: Path) -> None:
    program = script(tmp_path / "firecracker", f"echo '{text}'")
    with pytest.raises(InputError) as caught:
        program_version(program)
    assert caught.value.message.startswith(f"{program}: ")
    assert words in caught.value.message


def test_a_program_that_does_not_run_or_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "firecracker"
    odd.write_bytes(b"\x7fELF")
    odd.chmod(0o755)
    with pytest.raises(MachineError, match="firecracker can't be started: Exec format error") as caught:
        program_version(odd)
    assert "processor" in (caught.value.hint or "")
    monkeypatch.setattr(checks, "_SECONDS", 0.1)
    with pytest.raises(MachineError, match="--version failed: it did not end within"):
        program_version(script(tmp_path / "slow", "exec sleep 60"))


def test_a_kernel_has_to_be_one_that_firecracker_boots(tmp_path: Path) -> None:
    good = kernel_file(tmp_path / "vmlinux")
    assert check_kernel(str(good), "x86_64") == good
    assert check_kernel(str(good), "aarch64") == good
    assert check_kernel(str(good)) == good
    with pytest.raises(InputError, match=r"machine\.firecracker\.kernel is not set"):
        check_kernel(None)
    with pytest.raises(InputError, match="none can't be read: No such file"):
        check_kernel(str(tmp_path / "none"))
    packed = tmp_path / "bzImage"
    packed.write_bytes(bytes(0x202) + b"HdrS" + bytes(1024))
    with pytest.raises(InputError, match=r"is a compressed one \(bzImage\)") as caught:
        check_kernel(str(packed), "x86_64")
    assert "extract-vmlinux" in (caught.value.hint or "")
    packed.write_bytes(b"text")
    with pytest.raises(InputError, match="is something else"):
        check_kernel(str(packed), "x86_64")
    with pytest.raises(InputError, match=r"is not a kernel for aarch64 .*\n  hint: .*arch/arm64/boot/Image"):
        check_kernel(str(packed), "aarch64")


def test_a_path_of_107_bytes_is_the_longest(tmp_path: Path) -> None:
    check_socket_path(Path("/" + "x" * 106), "x")
    with pytest.raises(InputError, match="that takes 108 bytes") as caught:
        check_socket_path(Path("/" + "ü" * 53 + "x"), "the name")
    assert caught.value.hint == "make the name shorter"


Make = Callable[..., object]


@pytest.fixture
def make(workspace: Workspace, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a machine out of settings; the host has KVM and may make taps."""
    monkeypatch.setattr(kvm, "check_kvm", lambda *_: None)
    monkeypatch.setattr("firebuild_bootstrap.machine.firecracker.network.may_make_taps", lambda: True)
    monkeypatch.setattr("firebuild_bootstrap.machine.firecracker.network._TUN", programs)

    def run(**block: Any) -> object:
        given = {"program": str(programs / "firecracker"), "kernel": str(programs / "vmlinux"), **block}
        dotted = {f"{BLOCK}.{name.replace('__', '.')}": value for name, value in given.items()}
        settings = load_settings(None, {}, {"machine.driver": "firecracker", **dotted})
        return firecracker_machine(settings.machine, workspace, store=workspace.path, notice=print)

    return run


def test_a_machine_is_made_without_starting_anything(
    make: Make, workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    machine: Any = make(kernel_modules=[str(tmp_path)], serial_log=str(tmp_path / "log"))
    assert os.listdir(workspace.path) == []
    assert machine.poll() is None
    assert machine.stop() is None
    with pytest.raises(MachineError, match="has no network or no drive yet"):
        machine.start()
    Leftovers(workspace.path).add_command(["sh", "-c", "exit 9"])
    machine.close()
    machine.close()
    assert capsys.readouterr().out == "sh -c exit 9 failed: 9\n"
    assert not workspace.path.exists()


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"program": "/nowhere/firecracker"},
            f"{BLOCK}.program: the program /nowhere/firecracker was not found",
        ),
        ({"kernel": "/nowhere/vmlinux"}, f"{BLOCK}.kernel: /nowhere/vmlinux can't be read"),
        ({"kernel_args": ["two words"]}, "'two words' can't be an argument of a kernel"),
        ({"kernel_modules": ["/nowhere"]}, "machine.firecracker.kernel_modules: /nowhere is not a directory"),
        ({"serial_log": "/nowhere/log"}, f"{BLOCK}.serial_log: /nowhere/log can't be written"),
        ({"network__tap": "nowhere0"}, f"{BLOCK}.network.tap: nowhere0: there is no such interface"),
        ({"network__cni_config": "/nowhere", "network__cni": "x"}, "cni"),
        ({"network__host": "1.2.3.4"}, "host and guest come from pool"),
        ({"running__socket": "/nowhere/s"}, f"{BLOCK}.running.socket: /nowhere/s: there is no socket"),
        ({"running__socket": "/" + "x" * 120}, "that takes 121 bytes"),
        (
            {"running__socket": "/nowhere/s", "network__cni": "x"},
            f"{BLOCK}.running: a Firecracker that runs already has its jail and its network namespace",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    make: Make, workspace: Workspace, block: dict[str, Any], words: str
) -> None:
    with pytest.raises(FirebuildError) as caught:
        make(**block)
    assert words in str(caught.value)
    assert os.listdir(workspace.path) == []


def test_the_jailer_needs_root_and_a_program_of_its_liking(
    make: Make, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jailer = {
        "jailer__enabled": True,
        "jailer__uid": 1,
        "jailer__gid": 1,
        "jailer__program": str(programs / "jailer"),
        "jailer__chroot_base": "/srv/j",
    }
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(InputError, match="the jailer needs root"):
        make(**jailer)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    other = script(tmp_path / "vmm", "echo Firecracker v1.7.0")
    with pytest.raises(InputError, match="has firecracker in its name only"):
        make(**jailer, program=str(other))
    with pytest.raises(InputError, match=r"jailer\.program: the program /nowhere was not found"):
        make(**{**jailer, "jailer__program": "/nowhere"})
    make(**jailer)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"jailer__enabled": True}, "the jailer needs uid and gid"),
        ({"jailer__cgroups": ["io.max=8:0 rbps=1"]}, "expected a limit such as memory.max=2G"),
        ({"jailer__cgroups": ["memory.max"]}, "expected a limit such as memory.max=2G"),
        ({"network__tap": "a", "network__cni": "b"}, "expected one of tap and cni, found both"),
        ({"network__tap": "a" * 16}, "expected the name of an interface"),
        ({"network__mac": "01:00:00:00:00:01"}, "expected the MAC address of one interface"),
        ({"network__mac": "06"}, "expected the MAC address of one interface"),
        ({"network__guest": "10.0.0.2"}, "expected dhcp, or an address such as 172.30.0.2/30"),
        ({"network__guest": "ten/8"}, "expected dhcp, or an address such as 172.30.0.2/30"),
        ({"network__host": "ten"}, "expected an IPv4 address"),
        ({"network__pool": "10.0.0.1/8"}, "expected a network such as 172.30.0.0/16"),
        ({"network__pool": "10.0.0.0/31"}, "expected a network of at least four addresses"),
        ({"network__name_servers": ["10.0.0.1"] * 3}, "name_servers"),
        ({"mmds_address": "10.0.0.1"}, "expected a link-local address"),
        ({"mmds_address": "169.254.0.1"}, "expected a link-local address, 169.254.1.0 to 169.254.254.255"),
        ({"mmds_address": "169.254.255.1"}, "expected a link-local address"),
        ({"vcpus": 33}, "vcpus"),
        ({"vcpus": 3, "smt": True}, "with smt the number of vcpus has to be 1 or even, found 3"),
        ({"memory": "1MiB"}, "memory"),
        ({"mmds_version": "V3"}, "mmds_version"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Make, block: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make(**block)
    assert words in str(caught.value)
    assert "machine.firecracker" in str(caught.value)


def test_settings_are_normalised(make: Make) -> None:
    settings = load_settings(
        None, {}, {f"{BLOCK}.network.mac": "06:00:00:AB:00:01", f"{BLOCK}.network.guest": "dhcp"}
    )
    network = settings.machine.firecracker.network
    assert (network.mac, network.guest) == ("06:00:00:ab:00:01", "dhcp")


def test_a_running_firecracker_has_to_be_fresh(
    make: Make, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "fc.sock"
    monkeypatch.setenv("FC_EMULATOR_FAULT", "stuck")
    with ended(subprocess.Popen([programs / "firecracker", "--api-sock", "fc.sock"], cwd=tmp_path)):
        until(path.exists, "the socket")
        make(running__socket=str(path))
        with pytest.raises(InputError, match=r"running\.root: .*none is not a directory"):
            make(running__socket=str(path), running__root=str(tmp_path / "none"))
        api = FirecrackerApi(path)
        api.put("/boot-source", {"kernel_image_path": str(programs / "vmlinux")})
        start(api)
        with pytest.raises(InputError, match="has started no machine yet, its state is 'Running'"):
            make(running__socket=str(path))
    with pytest.raises(ApiError, match="did not answer GET /version: Connection refused"):
        make(running__socket=str(path))


def test_something_else_behind_the_socket_is_refused(make: Make, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ApiError, match="did not answer GET /version"):
            make(running__socket=str(tmp_path / "s"))
