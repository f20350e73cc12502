"""The jail's files and the processes, where whole builds do not reach."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine.firecracker import process
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi
from firebuild_bootstrap.machine.firecracker.process import (
    ForeignProcess,
    StartedProcess,
    describe_status,
)
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings, JailerSettings
from firebuild_bootstrap.machine.firecracker.source import (
    Jail,
    JailedSource,
    Program,
    RunningSource,
    WorkDirectory,
    jail_directory,
    jailer_command,
)
from firebuild_bootstrap.machine.leftovers import Leftovers
from machine_firecracker.fc_tools import ended, until


@pytest.fixture
def jail(tmp_path: Path) -> Jail:
    (tmp_path / "jail").mkdir()
    return Jail(tmp_path / "jail", os.geteuid(), os.getegid())


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    path = tmp_path / "disk.ext4"
    path.write_bytes(b"drive")
    return path


def test_files_go_into_the_jail_and_the_drive_comes_back(jail: Jail, drive: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux-6.1"
    kernel.write_bytes(b"kernel")
    assert jail.show(kernel, "vmlinux") == "/vmlinux"
    assert jail.expose(drive, drive.name) == "/disk.ext4"
    assert sorted(os.listdir(jail.root)) == ["disk.ext4", "vmlinux"]
    assert (jail.root / "vmlinux").stat().st_mode & 0o777 == 0o400
    assert (jail.root / "disk.ext4").stat().st_mode & 0o777 == 0o600
    assert kernel.exists()
    assert not drive.exists()
    jail.take_back(drive, drive.name)
    jail.take_back(drive, drive.name)
    assert drive.read_bytes() == b"drive"
    jail.clear()
    jail.clear()
    assert os.listdir(jail.root) == []


def test_a_snapshot_is_shared_as_it_is_or_copied_with_its_holes(
    jail: Jail, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive.chmod(0o444)
    assert jail.share(drive, "snapshot") == "/snapshot"
    assert (jail.root / "snapshot").samefile(drive)
    jail.clear()

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    assert jail.share(drive, "snapshot") == "/snapshot"
    assert not (jail.root / "snapshot").samefile(drive)
    assert (jail.root / "snapshot").read_bytes() == b"drive"
    assert drive.stat().st_mode & 0o777 == 0o444


def test_what_firecracker_has_put_in_the_place_of_the_drive_is_not_taken(
    jail: Jail, drive: Path, tmp_path: Path
) -> None:
    (tmp_path / "shadow").write_text("secret")
    jail.expose(drive, drive.name)
    (jail.root / drive.name).unlink()
    (jail.root / drive.name).symlink_to(tmp_path / "shadow")
    with pytest.raises(MachineError, match="the machine's drive, is gone"):
        jail.take_back(drive, drive.name)
    (jail.root / drive.name).unlink()
    with pytest.raises(MachineError, match="the machine's drive, is gone"):
        jail.take_back(drive, drive.name)


def across_file_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuse)


@pytest.mark.parametrize("across", [False, True])
def test_links_in_a_jail_are_not_followed(
    jail: Jail, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, across: bool
) -> None:
    (tmp_path / "shadow").write_text("secret")
    (tmp_path / "shadow").chmod(0o640)
    for name in ("vmlinux", drive.name):
        (jail.root / name).symlink_to(tmp_path / "shadow")
    if across:
        across_file_systems(monkeypatch)
    with pytest.raises(MachineError, match=r"can't be brought to .*vmlinux: File exists"):
        jail.show(drive, "vmlinux")
    jail.expose(drive, drive.name)
    assert not (jail.root / drive.name).is_symlink()
    assert (tmp_path / "shadow").read_text() == "secret"
    assert (tmp_path / "shadow").stat().st_mode & 0o777 == 0o640
    jail.clear()
    assert os.listdir(jail.root) == ["vmlinux"]


def test_another_file_system_gets_a_copy_with_holes(
    jail: Jail, drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drive.open("r+b") as file:
        file.truncate(64 << 20)

    across_file_systems(monkeypatch)
    jail.expose(drive, drive.name)
    assert not drive.exists()
    lent = jail.root / drive.name
    assert (lent.stat().st_size, lent.stat().st_blocks * 512 < 1 << 20) == (64 << 20, True)
    assert lent.stat().st_mode & 0o777 == 0o600
    jail.take_back(drive, drive.name)
    assert drive.read_bytes().startswith(b"drive")
    shutil.rmtree(jail.root)
    with pytest.raises(MachineError, match="can't be moved to"):
        jail.expose(drive, drive.name)


def test_a_jail_that_cannot_take_files_is_an_error(
    jail: Jail, drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MachineError, match=r"none can't be brought to .*vmlinux: No such file"):
        jail.show(tmp_path / "none", "vmlinux")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for refused in ("rename", "chown"):
        monkeypatch.setattr(os, refused, refuse)
        with pytest.raises(MachineError, match=r"can't be brought to .*: Operation not permitted"):
            jail.expose(drive, drive.name)
        assert drive.exists()


def test_without_a_jail_files_stay_where_they_are(drive: Path) -> None:
    shared = WorkDirectory()
    assert shared.show(drive, "x") == shared.expose(drive, "x") == shared.share(drive, "x") == str(drive)
    shared.take_back(drive, "x")
    assert drive.exists()


def test_the_jailer_is_told_the_limits() -> None:
    settings = JailerSettings(enabled=True, uid=1, gid=2, cgroups=("memory.max=1G", "pids.max=9"))
    programs = (Path("/jailer"), Path("/firecracker"))
    command = jailer_command(settings, programs, ["--api-sock", "/s"], "id", "/run/netns/n")
    assert list(map(str, command)) == [
        *("/jailer", "--id", "id", "--exec-file", "/firecracker", "--uid", "1", "--gid", "2"),
        *("--chroot-base-dir", "/srv/jailer", "--netns", "/run/netns/n", "--cgroup-version", "2"),
        *("--cgroup", "memory.max=1G", "--cgroup", "pids.max=9", "--", "--api-sock", "/s"),
    ]


def test_a_jail_has_the_same_place_for_firebuild_and_the_jailer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for base, found in (("jails", tmp_path / "jails"), ("~/jails", Path("/home/me/jails"))):
        settings = JailerSettings(enabled=True, uid=1, gid=2, chroot_base=base)
        assert jail_directory(settings, Path("/firecracker"), "id") == found / "firecracker/id"
        assert found in jailer_command(settings, (Path("/j"), Path("/firecracker")), [], "id", "")


@pytest.mark.parametrize(
    ("version", "groups"),
    [
        (2, ["/sys/fs/cgroup/firecracker/id"]),
        (1, ["/sys/fs/cgroup/memory/firecracker/id", "/sys/fs/cgroup/pids/firecracker/id"]),
    ],
)
def test_the_groups_of_the_jailer_are_on_the_list_of_leftovers(
    tmp_path: Path, version: int, groups: list[str]
) -> None:
    block = {
        "enabled": True,
        "uid": 0,
        "gid": 0,
        "chroot_base": str(tmp_path / "j"),
        "cgroups": ["memory.limit=1", "pids.max=2"],
        "cgroup_version": version,
    }
    program = Program(
        settings=FirecrackerSettings.model_validate({"jailer": block}),
        path=Path("/bin/firecracker"),
        version=(1, 13),
        machine_id="id",
        directory=tmp_path,
        leftovers=Leftovers(tmp_path),
    )
    source = JailedSource(program, Path("/bin/jailer"))
    source.prepare_place()
    text = (tmp_path / "leftovers").read_text()
    assert [f'["rmdir", "{group}"]' in text for group in groups] == [True] * len(groups)
    with pytest.raises(MachineError, match=r"the jail .* can't be made: File exists"):
        source.prepare_place()
    assert Leftovers(tmp_path).clear() == []
    assert not (tmp_path / "j/firecracker/id").exists()


def started(tmp_path: Path, *command: str, log: IO[bytes] | None = None) -> StartedProcess:
    return StartedProcess(command, directory=tmp_path, stat_file=tmp_path / "stat", log=log)


def test_a_process_is_known_before_it_becomes_the_program(tmp_path: Path) -> None:
    one = started(tmp_path, "sh", "-c", "echo $$; cat ./stat", log=(tmp_path / "log").open("wb"))
    assert one.wait(20)
    pid, stat = one.serial().split("\n", 1)
    assert stat.startswith(f"{pid} ")
    assert (tmp_path / "log").read_text() == one.serial()
    assert one.trouble() == ""
    one.close()


def test_a_process_is_ended_by_force(tmp_path: Path) -> None:
    one = started(tmp_path, "sh", "-c", "echo hello; exec sleep 600")
    until(lambda: "hello" in one.serial(), "the first words")
    assert not one.wait(0)
    one.kill()
    assert one.trouble() == "firecracker was ended by SIGKILL"
    one.close()


def test_a_process_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    log = (tmp_path / "log").open("wb")
    with pytest.raises(MachineError, match=r"firecracker can't be started: .*/none: No such file"):
        StartedProcess(["firecracker"], directory=tmp_path / "none", stat_file=tmp_path / "s", log=log)
    assert log.closed
    with pytest.raises(MachineError, match="can't be started"):
        StartedProcess(["firecracker"], directory=tmp_path / "none", stat_file=tmp_path / "s")


def test_statuses_have_words() -> None:
    assert describe_status(3) == "firecracker ended with status 3"
    assert describe_status(152) == "firecracker ended with status 152 (a bad configuration)"
    assert describe_status(-11) == "firecracker was ended by SIGSEGV"


SERVER = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    time.sleep(600)
"""


def is_up(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as link:
        return link.connect_ex(str(path)) == 0


@pytest.mark.parametrize("known", [True, False])
def test_a_foreign_process_is_watched_and_ended(
    tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:  # it is in a PID namespace of its own
        # Not in the module struct itself: the thread that brings this worker its tests reads them with it,
        # and would wait for ever for what a header of nothing but zeros announces.
        unknown = SimpleNamespace(calcsize=struct.calcsize, unpack=lambda *_: (0, 0, 0))
        monkeypatch.setattr(process, "struct", unknown)
    (tmp_path / "serial").write_text("words")
    with ended(subprocess.Popen([sys.executable, "-c", SERVER, tmp_path / "s"])) as server:
        until(lambda: is_up(tmp_path / "s"), "the socket")
        one = ForeignProcess(FirecrackerApi(tmp_path / "s"), tmp_path / "serial")
        assert not one.wait(0.05)
        assert (one.serial(), one.trouble()) == ("words", "")
        if known:
            one.kill()
        else:
            monkeypatch.setattr(process, "_KILL_SECONDS", 0.05)
            with pytest.raises(MachineError, match="does not end"):
                one.kill()
            server.kill()
        assert one.wait(None)
        assert server.wait(10) == -signal.SIGKILL
        one.close()
        one.close()


def test_a_foreign_process_that_has_gone_has_ended(tmp_path: Path) -> None:
    one = ForeignProcess(FirecrackerApi(tmp_path / "none"), tmp_path / "none")
    assert one.wait(0)
    one.kill()
    assert "can't be read: No such file" in one.serial()
    assert ForeignProcess(FirecrackerApi(tmp_path / "none"), None).serial() == ""


@pytest.mark.parametrize("error", [TimeoutError, BlockingIOError])
def test_a_foreign_process_that_is_busy_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    one = ForeignProcess(FirecrackerApi(tmp_path / "none"), None)

    def busy(*_: object) -> Any:
        raise error

    monkeypatch.setattr(process, "connect", busy)
    assert not one.wait(0)


def test_files_for_a_running_firecracker_without_a_jail_stay(tmp_path: Path) -> None:
    block = {"running": {"socket": str(tmp_path / "s")}}
    source = RunningSource(FirecrackerSettings.model_validate(block))
    assert type(source.prepare_place()) is WorkDirectory
    assert source.is_silent
    source.clear()
