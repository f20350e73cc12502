"""Whole builds in an emulated Firecracker, on a network that is this host's loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.build import build_image
from firebuild_bootstrap.errors import GuestLost, Interrupted, MachineError, StepFailed
from firebuild_bootstrap.events import Event, Notice, StepOutput
from firebuild_bootstrap.home import Home
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.outputs import parse_outputs
from firebuild_bootstrap.image.store import StoredImage
from firebuild_bootstrap.machine import kvm
from firebuild_bootstrap.machine.base import GuestOptions
from firebuild_bootstrap.machine.drivers import DOCTOR
from firebuild_bootstrap.machine.drives import Drives
from firebuild_bootstrap.machine.firecracker import driver
from firebuild_bootstrap.machine.firecracker.driver import FirecrackerMachine
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.machine.firecracker.source import PlainSource, Program
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.request import BuildRequest
from firebuild_bootstrap.settings import BuildSettings, load_settings
from machine_firecracker.fc_tools import FakeNetwork, requests, until

pytestmark = [pytest.mark.needs("bwrap"), pytest.mark.needs("debugfs")]
DOCKERFILE = """
FROM host
COPY greeting /srv/greeting
RUN echo "kernel $(cat /srv/greeting)" && ln /srv/greeting /srv/again && chmod 4755 /srv/again
"""


class Rig:
    """A host on which builds run in an emulated Firecracker."""

    def __init__(self, tmp_path: Path, store: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tmp_path = tmp_path
        self.home = Home(store, check=self.check)
        self.context = tmp_path / "context"
        self.context.mkdir()
        (self.context / "greeting").write_text("hello\n")
        self.log = tmp_path / "requests.log"
        self.log.touch()
        self.events: list[Event] = []
        self.network = FakeNetwork()
        self.interrupted = threading.Event()
        self.settings: dict[str, object] = {
            "machine.driver": "firecracker",
            "machine.disk_size": "300MiB",
            "machine.firecracker.program": str(programs / "firecracker"),
            "machine.firecracker.kernel": str(programs / "vmlinux"),
        }
        monkeypatch.setattr(kvm, "check_kvm", lambda *_: None)
        monkeypatch.setattr(driver, "_network", lambda *_: self.network)
        monkeypatch.setenv("FC_EMULATOR_TAPS", "fctest0")
        monkeypatch.setenv("FC_EMULATOR_LOG", str(self.log))

    def check(self) -> None:
        if self.interrupted.is_set():
            raise Interrupted("the build was interrupted")

    def build(
        self,
        dockerfile: str = DOCKERFILE,
        outputs: tuple[str, ...] = ("tar",),
        keep_failed: Path | None = None,
    ) -> StoredImage:
        (self.context / "Dockerfile").write_text(dockerfile)
        request = BuildRequest(
            dockerfile=self.context / "Dockerfile",
            context=self.context,
            tag=Reference.parse(f"test/{self.tmp_path.name.replace('_', '-').lower()}:1"),
            outputs=parse_outputs(outputs),
            keep_failed=keep_failed,
            no_cache=True,
        )
        settings: BuildSettings = load_settings(None, {}, self.settings)
        image = build_image(request, settings, self.home, events=self.events.append)
        assert image is not None
        return image

    @property
    def output(self) -> str:
        return b"".join(one.data for one in self.events if isinstance(one, StepOutput)).decode()

    @property
    def notices(self) -> list[str]:
        return [event.message for event in self.events if isinstance(event, Notice)]

    def assert_nothing_is_left(self) -> None:
        builds = self.home.root / "builds"
        assert [path for path in builds.iterdir() if path.is_dir()] == []
        assert not self.network.connected
        me = str(self.home.root)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    where = os.readlink(entry / "cwd")
                except OSError:
                    continue
                assert not where.startswith(f"{me}/builds"), entry


@pytest.fixture
def rig(tmp_path: Path, store: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, store, programs, monkeypatch)


def test_a_build_runs_in_the_machine_and_its_layers_are_the_image(rig: Rig, tmp_path: Path) -> None:
    image = rig.build(outputs=("ext4", "tar"))
    assert "kernel hello" in rig.output
    with tarfile.open(image.location / "rootfs.tar") as tar:
        again, greeting = tar.getmember("srv/again"), tar.getmember("srv/greeting")
        assert (again.mode, greeting.linkname) == (0o4755, "srv/again")
        assert "etc/motd" not in tar.getnames()
    subprocess.run(["e2fsck", "-fn", image.location / "rootfs.ext4"], check=True, capture_output=True)
    rig.assert_nothing_is_left()
    asked = [(method, path) for status, method, path, _ in requests(rig.log) if status == 204]
    assert asked == [
        ("PUT", "/machine-config"),
        ("PUT", "/boot-source"),
        ("PUT", "/drives/drive0"),
        ("PUT", "/drives/drive1"),
        ("PUT", "/network-interfaces/eth0"),
        ("PUT", "/mmds/config"),
        ("PUT", "/mmds"),
        ("PUT", "/actions"),
        ("PATCH", "/mmds"),
    ]
    assert "PRIVATE KEY" not in rig.log.read_text()


def test_the_local_machine_makes_the_same_image(rig: Rig) -> None:
    in_machine = rig.build(outputs=("dir",)).record.outputs[0]
    rig.settings = {"machine.driver": "local"}
    assert rig.build(outputs=("dir",)).record.outputs[0] == in_machine


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_both_versions_of_the_metadata_service_work(rig: Rig, version: str) -> None:
    rig.settings["machine.firecracker.mmds_version"] = version
    rig.build("FROM scratch\nCOPY greeting /\n")
    config = next(body for _, _, path, body in requests(rig.log) if path == "/mmds/config")
    assert config == {
        "network_interfaces": ["eth0"],
        "version": version,
        "ipv4_address": "169.254.169.254",
    }


@pytest.mark.parametrize("version", ["V1", "V2"])
def test_old_releases_work(rig: Rig, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("FC_EMULATOR_RELEASE", "1.0.0")
    rig.settings["machine.firecracker.mmds_version"] = version
    rig.build("FROM scratch\nCOPY greeting /\n")
    boot = next(body for _, _, path, body in requests(rig.log) if path == "/boot-source")
    assert ("pci=off" in boot["boot_args"].split()) == (os.uname().machine == "x86_64")


def test_the_kernel_gets_the_settings(rig: Rig, tmp_path: Path) -> None:
    rig.settings |= {
        "machine.firecracker.vcpus": 3,
        "machine.firecracker.memory": "256MiB",
        "machine.firecracker.kernel_args": ["loglevel=7"],
        "machine.firecracker.mmds_address": "169.254.170.2",
        "machine.firecracker.serial_log": str(tmp_path / "serial.log"),
    }
    rig.build("FROM scratch\nCOPY greeting /\n")
    found = {path: body for _, method, path, body in requests(rig.log) if method == "PUT"}
    assert found["/machine-config"] == {"vcpu_count": 3, "mem_size_mib": 256, "smt": False}
    words = found["/boot-source"]["boot_args"].split()
    assert {"reboot=k", "loglevel=7", "ip=172.16.0.2::172.16.0.1:255.255.255.252:::off"} <= set(words)
    assert "firebuild.mmds=http://169.254.170.2" in words
    assert "pci=off" not in words
    assert 'firebuild-initramfs: {"version": 1, "status": "success"' in (tmp_path / "serial.log").read_text()


def test_a_failing_step_fails_the_build_as_everywhere(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(StepFailed, match="exit code 7") as caught:
        rig.build("FROM host\nRUN echo > /first\nRUN echo > /made; exit 7\n", keep_failed=tmp_path / "kept")
    assert caught.value.exit_code == 7
    rig.assert_nothing_is_left()
    [kept] = (tmp_path / "kept").iterdir()
    assert sorted(os.listdir(kept)) == ["console.log", "failure.json", "rootfs.tar"]
    assert '"exit": 1, "message": "the command exited with status 7"' in (kept / "console.log").read_text()
    with tarfile.open(kept / "rootfs.tar") as tar:
        names = tar.getnames()
    assert ("first" in names, "made" in names) == (True, False)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (
            "die=152",
            MachineError,
            r"firecracker ended with status 152 \(a bad configuration\) before .*it hurts",
        ),
        ("die=0", MachineError, r"firecracker ended before its guest could boot; it said: .*it hurts"),
        ("start", MachineError, r"refused PUT /actions with status 400: Internal error .*Kvm"),
        ("late-die=148", GuestLost, r"firecracker ended with status 148 \(a system call that its filter"),
        ("panic", GuestLost, r"the machine's kernel gave up: .*Unable to mount root fs"),
    ],
)
def test_a_machine_that_fails_says_why(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, fault: str, error: type[Exception], words: str
) -> None:
    monkeypatch.setenv("FC_EMULATOR_FAULT", fault)
    with pytest.raises(error, match=f"(?s){words}") as caught:
        rig.build("FROM scratch\nCOPY greeting /\n", keep_failed=rig.tmp_path / "kept")
    assert DOCTOR in str(caught.value)
    rig.assert_nothing_is_left()
    [kept] = (rig.tmp_path / "kept").iterdir()
    assert {"rootfs.tar", "failure.json"} <= set(os.listdir(kept))


def test_a_guest_that_never_calls_is_ended_by_force(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FC_EMULATOR_FAULT", "stuck")
    rig.settings["bootstrap.initial_timeout"] = "4s"  # time enough for its first words
    with pytest.raises(GuestLost, match="4 s") as caught:
        rig.build("FROM scratch\nCOPY greeting /\n")
    assert "look at the machine's console" in (caught.value.hint or "")
    rig.assert_nothing_is_left()


def test_a_guest_that_has_not_run_one_instruction_points_to_kvm(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FC_EMULATOR_FAULT", "silent")
    rig.settings["bootstrap.initial_timeout"] = "1s"
    with pytest.raises(GuestLost, match="1 s") as caught:
        rig.build("FROM scratch\nCOPY greeting /\n")
    hint = caught.value.hint or ""
    assert "its console is empty: the guest has not run one instruction. Most likely /dev/kvm opens" in hint
    assert "machine.qemu.accelerator: tcg" in hint
    rig.settings["machine.firecracker.kernel_args"] = ["console=none"]
    with pytest.raises(GuestLost, match="1 s") as caught:
        rig.build("FROM scratch\nCOPY greeting /\n")
    assert "look at the machine's console" in (caught.value.hint or "")
    rig.assert_nothing_is_left()


def test_a_firecracker_without_a_socket_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from firebuild_bootstrap.machine.firecracker import driver

    monkeypatch.setenv("FC_EMULATOR_FAULT", "deaf")
    monkeypatch.setattr(driver, "_READY_SECONDS", 0.2)
    with pytest.raises(MachineError, match="did not answer GET /: No such file"):
        rig.build("FROM scratch\nCOPY greeting /\n")
    rig.assert_nothing_is_left()


def test_an_interrupted_build_leaves_nothing(rig: Rig) -> None:
    def interrupt() -> None:
        until(lambda: "ready" in rig.output, "the step")
        rig.interrupted.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        rig.build("FROM host\nRUN echo ready; sleep 600\n")
    thread.join()
    rig.interrupted.clear()
    rig.assert_nothing_is_left()


def test_a_killed_machine_is_noticed(rig: Rig) -> None:
    def kill() -> None:
        until(lambda: "ready" in rig.output, "the step")
        [stat] = rig.home.root.glob("builds/*/*/firecracker.stat")
        os.kill(int(stat.read_text().split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(GuestLost, match=r"firecracker was ended by SIGKILL|stopped"):
        rig.build("FROM host\nRUN echo ready; sleep 600\n")
    thread.join()
    rig.assert_nothing_is_left()


@pytest.fixture
def waiting(workspace: Workspace, store: Path, rig: Rig) -> Iterator[FirecrackerMachine]:
    """A machine whose vminit tries in vain to call."""
    machine = FirecrackerMachine(
        workspace,
        FirecrackerSettings(),
        drives=Drives(workspace, caches=store / "caches", size=64 << 20),
        source=PlainSource(
            Program(
                settings=FirecrackerSettings(),
                path=Path(str(rig.settings["machine.firecracker.program"])),
                version=(1, 13),
                machine_id="b1",
                directory=workspace.path,
                leftovers=Leftovers(workspace.path),
            )
        ),
        network=rig.network,
        kernel=Path(str(rig.settings["machine.firecracker.kernel"])),
        modules=(),
        store=store,
        leftovers=Leftovers(workspace.path),
    )
    machine.listen().listener.close()
    block = {"HostPort": "127.0.0.1:9", "CAChain": "x", "Cert": "x", "Key": "x", "ServerName": "x"}
    machine.metadata.put({"latest": {"meta-data": {"Bootstrap": block}}})
    machine.prepare([])
    yield machine
    machine.close()


def test_a_guest_ends_by_itself_when_it_is_asked_to(
    waiting: FirecrackerMachine, workspace: Workspace
) -> None:
    waiting.start(GuestOptions(connect_timeout=600))
    until((workspace.path / "guest/vminit.log").exists, "vminit")
    ended = waiting.stop(grace=60)
    assert ended is not None
    assert ended.code != 0
    assert "SIGKILL" not in ended.log
    assert waiting.stop() == ended
    assert waiting.layers() == ()
    assert "machine.firecracker.network has the guest's gateway" in waiting.no_network()
    with pytest.raises(MachineError, match="did not send the layer of every step"):
        waiting.tree()


def test_a_guest_that_does_not_listen_is_ended_by_force(
    waiting: FirecrackerMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FC_EMULATOR_FAULT", "stuck")
    waiting.start()
    assert waiting.poll() is None
    ended = waiting.stop(grace=0.1)
    assert ended is not None
    assert ended.log.startswith("firecracker was ended by SIGKILL: ")


Starter = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def running(programs: Path, tmp_path: Path) -> Starter:
    """Start a Firecracker as somebody else would."""

    def start(root: Path | None = None, owner: str = "") -> subprocess.Popen[bytes]:
        serial = tmp_path / "serial"
        environ = dict(os.environ)
        if root is not None:
            environ |= {"FC_EMULATOR_ROOT": str(root), "FC_EMULATOR_OWNER": owner}
        with serial.open("wb") as output:
            process = subprocess.Popen(
                [
                    programs / "firecracker",
                    "--api-sock",
                    "/run/fc.sock" if root else str(tmp_path / "fc.sock"),
                ],
                cwd=tmp_path,
                stdout=output,
                env=environ,
            )
        socket = (root / "run/fc.sock") if root else tmp_path / "fc.sock"
        until(socket.exists, "the socket")
        return process

    return start


@pytest.mark.parametrize("jailed", [False, True])
@pytest.mark.parametrize("with_serial", [False, True])
def test_a_firecracker_of_somebody_else_is_used(
    rig: Rig, running: Starter, tmp_path: Path, jailed: bool, with_serial: bool
) -> None:
    root = tmp_path / "jail"
    where = "machine.firecracker.running"
    if jailed:
        root.mkdir()
        rig.settings |= {
            f"{where}.root": str(root),
            f"{where}.uid": os.geteuid(),
            f"{where}.gid": os.getegid(),
        }
    if with_serial:
        rig.settings[f"{where}.serial"] = str(tmp_path / "serial")
    process = running(root if jailed else None, f"{os.geteuid()}:{os.getegid()}")
    rig.settings[f"{where}.socket"] = str((root / "run/fc.sock") if jailed else tmp_path / "fc.sock")
    image = rig.build("FROM scratch\nCOPY greeting /\n")
    assert (image.location / "rootfs.tar").exists()
    assert process.wait(20) == 0
    boot = next(body for _, _, path, body in requests(rig.log) if path == "/boot-source")
    assert "pci=off" not in boot["boot_args"].split()
    if jailed:
        assert sorted(os.listdir(root)) == ["run"]
        assert (boot["kernel_image_path"], boot["initrd_path"]) == ("/vmlinux", "/initrd")
    rig.assert_nothing_is_left()


def test_a_foreign_machine_is_ended_with_its_build(
    rig: Rig, running: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FC_EMULATOR_FAULT", "stuck")
    process = running()
    rig.settings |= {
        "machine.firecracker.running.socket": str(tmp_path / "fc.sock"),
        "bootstrap.initial_timeout": "1s",
    }
    with pytest.raises(GuestLost):
        rig.build("FROM scratch\nCOPY greeting /\n")
    assert process.wait(20) == -signal.SIGKILL
    rig.assert_nothing_is_left()
