"""`firebuild doctor`: what is there, what is missing, and what mends it."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.plugins import install_moody
from firebuild_bootstrap import doctor
from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.machine.drivers import DOCTOR
from firebuild_bootstrap.sandbox.idmap import Host, single
from machine_qemu.fake_qemu import fake_qemu
from machine_qemu.kernels import bzimage
from pki import conftest
from pki.conftest import Install
from support import Firebuild, leftovers

install = conftest.install


def findings(cli: Cli, *arguments: str | Path, status: int = 0) -> dict[str, dict[str, str]]:
    document = json.loads(cli("doctor", "--offline", "--json", *arguments, status=status).out)
    assert document["ready"] is (status == 0)
    return {one["about"]: one for one in document["findings"]}


def test_a_machine_that_builds_is_ready_and_nothing_is_left(cli: Cli) -> None:
    out = cli("doctor", "--offline").out
    assert "\nok    driver local        can be used (the configured one)\n" in out
    assert "\nok    CA embedded " in out
    assert out.endswith("\n\nready: builds with this configuration can work here\n")
    assert leftovers(cli.home) == []


def test_what_the_configuration_does_not_need_is_only_missing(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROGRAMS_PATH", "/nonexistent")
    found = findings(cli)
    assert found["git"]["level"] == "missing"
    assert found["git"]["hint"] == "install the package git: apt install git"
    assert found["driver firecracker"]["level"] == "missing"
    assert found["driver firecracker"]["hint"]


def test_what_the_configuration_needs_is_wrong_when_it_is_missing(cli: Cli) -> None:
    config = Path("firebuild.yaml")
    config.write_text("machine: {driver: qemu, qemu: {kernel: /nonexistent/vmlinuz}}\n")
    found = findings(cli, "--config", config, status=6)
    assert found["driver qemu"]["level"] == "wrong"
    assert "/nonexistent/vmlinuz can't be read" in found["driver qemu"]["message"]
    assert found["driver local"]["level"] == "ok"
    done = cli("doctor", "--offline", "--machine", "firecracker", status=6)
    assert "\nFAIL  driver firecracker  machine.firecracker.kernel is not set" in done.out
    assert done.out.endswith("need is missing\n")


def test_a_build_whose_machine_cannot_be_made_points_to_it(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nRUN true\n")
    cli.setenv("FIREBUILD_MACHINE__QEMU__KERNEL", "/nonexistent/vmlinuz")
    done = cli("build", "--machine", "qemu", "-t", "a:1", ".", status=2)
    assert f"; {DOCTOR}\n" in done.err


def test_what_the_user_gave_is_not_its_affair(cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM scratch\nRUN true\n")
    missing = cli("run", "--pull", "never", "nowhere:1", status=125)
    socket = Path("metadata.yaml")
    socket.write_text("machine: {driver: external, external: {metadata: {firecracker_socket: /no/socket}}}\n")
    external = cli("build", "--config", socket, "-t", "a:1", ".", status=6)
    assert "/no/socket" in external.err
    for done in (missing, external):
        assert "doctor" not in done.err, done


@pytest.mark.needs("userns")
@pytest.mark.parametrize("command", ["build --no-cache -t a:1 .", "run --machine local one true"])
def test_a_kernel_that_refuses_user_namespaces_points_to_it_behind_the_remedy(
    cli: Cli, tmp_path: Path, command: str
) -> None:
    firebuild = Firebuild(cli.home)
    (tmp_path / "tree").mkdir()
    firebuild("base", "import", "one", tmp_path / "tree")
    (tmp_path / "Dockerfile").write_text("FROM one\nRUN true\n")
    script = f'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" {command}'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, firebuild.program],
        env=firebuild.environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in (6, 125), done
    assert f"run `sysctl -w user.max_user_namespaces=15000`; {DOCTOR}\n" in done.stderr


@pytest.mark.needs("userns", "e2fsck")
def test_a_qemu_that_does_not_start_points_to_it(cli: Cli, tmp_path: Path) -> None:
    """It ends before its guest has called: only QEMU itself can say why."""
    (tmp_path / "vmlinuz").write_bytes(bzimage("0.0.1-test"))
    refusal = "Could not access KVM kernel module: Permission denied"
    qemu = fake_qemu(tmp_path, f"echo {refusal}; exit 1")
    block = {"program": str(qemu.path), "kernel": str(tmp_path / "vmlinuz"), "accelerator": "tcg"}
    Path("qemu.yaml").write_text(json.dumps({"machine": {"driver": "qemu", "qemu": block}}))
    Path("Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /\n")
    done = cli("build", "--config", "qemu.yaml", "-t", "a:1", ".", status=4)
    assert refusal in done.err
    assert done.err.endswith(f"\n  hint: {DOCTOR}\n")


def test_a_configuration_that_is_wrong_is_said_as_everywhere(cli: Cli) -> None:
    Path("firebuild.yaml").write_text("machine: {driver: qemo}\n")
    done = cli("doctor", "--config", "firebuild.yaml", status=2)
    assert done.err.startswith("error: firebuild.yaml:1:19: machine.driver: ")


def test_a_ca_that_issues_nothing_is_wrong(cli: Cli, install: Install) -> None:
    install_moody(install)
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[no-role, many]")
    done = cli("doctor", "--offline", "--ca", "moody", status=6)
    assert "FAIL  CA moody            role: " in done.out
    cli.setenv("FIREBUILD_CA__MOODY__MOODS", "[many]")
    found = cli("doctor", "--offline", "--ca", "moody").out
    assert "warn  CA moody " in found


def test_a_registry_that_does_not_answer_limits_and_is_named(cli: Cli) -> None:
    cli.setenv("FIREBUILD_REGISTRIES__DEFAULT", "127.0.0.1:1")
    out = cli("doctor").out
    assert "warn  registry 127.0.0.1:1 " in out


def test_a_sandbox_that_cannot_be_made_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Home) -> None:
        raise MachineError("no user namespaces here", hint="allow them")

    monkeypatch.setattr(Home, "idmap", property(refuse))
    found = findings(cli, status=6)
    assert found["sandbox"] == {
        "about": "sandbox",
        "level": "wrong",
        "message": "no user namespaces here",
        "hint": "allow them",
    }
    assert found["machine"]["level"] == "wrong"


def test_one_owner_and_little_room_are_limits(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    one = single(Host.current(), "there are no subordinate ids: usermod --add-subuids …")
    monkeypatch.setattr(Home, "idmap", property(lambda _: one))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20))
    monkeypatch.setattr(doctor, "guest_problem", lambda: "a guest did not execute one instruction")
    monkeypatch.setattr(doctor, "check_kvm", lambda: None)
    found = findings(cli)
    assert "there are no subordinate ids" in found["sandbox"]["hint"]
    assert found["store"]["level"] == "limited"
    assert "firebuild images prune" in found["store"]["hint"]
    assert found["kvm"]["message"] == "makes virtual machines, but a guest did not execute one instruction"


def test_a_clock_that_is_wrong_is_wrong(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e6)
    assert doctor._clock().level is doctor.Level.WRONG
