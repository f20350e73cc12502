"""What a machine has outside of its workspace is removed, whoever does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firebuild_bootstrap.image import layertrees
from firebuild_bootstrap.machine import leftovers as module
from firebuild_bootstrap.machine.leftovers import Leftovers, clear


@pytest.fixture
def leftovers(tmp_path: Path) -> Leftovers:
    return Leftovers(tmp_path)


def test_the_last_is_removed_first(leftovers: Leftovers, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for name in ("first", "second"):
        leftovers.add_command(
            ["sh", "-c", f'echo "{name} $WHAT $(cat)" >> {log}'], text="input", env={"WHAT": "the"}
        )
    assert leftovers.clear() == []
    assert log.read_text() == "second the input\nfirst the input\n"
    assert leftovers.clear() == []
    assert log.read_text().count("\n") == 2


def test_a_command_that_fails_is_told_unless_it_is_quiet(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftovers.add_command(["sh", "-c", "exit 3"], quiet=True)
    leftovers.add_command(["sh", "-c", "echo no >&2; exit 3"])
    leftovers.add_command(["sh", "-c", "exit 3"])
    leftovers.add_command(["/nowhere/program"])
    leftovers.add_command(["sleep", "60"])
    monkeypatch.setattr(module, "_COMMAND_SECONDS", 0.1)
    slow, missing, silent, loud = leftovers.clear()
    assert slow == "sleep 60: it did not end within 0.1 seconds"
    assert "No such file" in missing
    assert silent == "sh -c exit 3 failed: 3"
    assert loud.endswith("failed: no")


def test_directories_are_removed(
    leftovers: Leftovers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jail = tmp_path / "jail"
    (jail / "root").mkdir(parents=True)
    leftovers.add_directory(jail)
    leftovers.add_directory(tmp_path / "never-made")
    assert leftovers.clear() == []
    assert not jail.exists()
    (tmp_path / "file").touch()
    leftovers.add_directory(tmp_path / "file")
    assert leftovers.clear() == [f"{tmp_path / 'file'} could not be removed: Not a directory"]


def introduced(stat_file: Path) -> subprocess.Popen[bytes]:
    command: list[str | Path] = ["sh", "-c", 'cat /proc/$$/stat > "$0"; echo x; exec sleep 600', stat_file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def test_processes_are_ended(leftovers: Leftovers, tmp_path: Path) -> None:
    leftovers.add_process(tmp_path / "never-started")
    leftovers.add_process(tmp_path / "stat")
    process = introduced(tmp_path / "stat")
    assert leftovers.clear() == []
    assert process.wait(10) == -9
    leftovers.add_process(tmp_path / "stat")
    assert leftovers.clear() == []


def test_another_process_of_the_same_number_is_left_alone(leftovers: Leftovers, tmp_path: Path) -> None:
    process = introduced(tmp_path / "stat")
    words = (tmp_path / "stat").read_text().rpartition(")")
    fields = words[2].split()
    fields[19] = str(int(fields[19]) - 1)
    (tmp_path / "stat").write_text(f"{words[0]}) {' '.join(fields)}")
    leftovers.add_process(tmp_path / "stat")
    assert leftovers.clear() == []
    assert process.poll() is None
    process.kill()
    process.wait()


def test_after_a_restart_no_process_is_ended(
    leftovers: Leftovers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = introduced(tmp_path / "stat")
    leftovers.add_process(tmp_path / "stat")
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(layertrees, "_BOOT_ID", tmp_path / "boot_id")
    assert leftovers.clear() == []
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_process_that_does_not_end_is_told(
    leftovers: Leftovers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = introduced(tmp_path / "stat")
    leftovers.add_process(tmp_path / "stat")
    monkeypatch.setattr(module, "_PROCESS_SECONDS", 0.0)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    assert leftovers.clear() == [f"the process {process.pid} did not end"]
    process.kill()
    process.wait()


def test_a_process_may_end_by_itself_meanwhile(
    leftovers: Leftovers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = introduced(tmp_path / "stat")
    leftovers.add_process(tmp_path / "stat")
    pidfd_open = os.pidfd_open

    def held_too_late(pid: int) -> int:
        descriptor = pidfd_open(pid)
        process.kill()
        process.wait()
        return descriptor

    monkeypatch.setattr(os, "pidfd_open", held_too_late)
    assert leftovers.clear() == []


def test_a_list_that_broke_off_is_still_cleared(leftovers: Leftovers, tmp_path: Path) -> None:
    (tmp_path / "jail").mkdir()
    leftovers.add_directory(tmp_path / "jail")
    with (tmp_path / "leftovers").open("a") as file:
        file.write('{"kind": "comm')
    assert clear(tmp_path) == []
    assert not (tmp_path / "jail").exists()
    assert clear(tmp_path / "nowhere") == []


def test_the_list_can_be_cleared_by_another_process(leftovers: Leftovers, tmp_path: Path) -> None:
    leftovers.add_process(tmp_path / "stat")
    process = introduced(tmp_path / "stat")
    program = (
        "import sys; from pathlib import Path; from firebuild_bootstrap.machine.leftovers import clear; "
        "import json; print(json.dumps(clear(Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert json.loads(done.stdout) == []
    assert process.wait(10) == -9
