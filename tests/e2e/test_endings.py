"""However a build ends, the exit status says why, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support import Firebuild, eventually

pytestmark = [pytest.mark.needs("userns")]

MARK = f"4242.{os.getpid()}"  # seconds that nothing else on the machine sleeps


def running(pattern: str) -> list[int]:
    """Process ids whose command line contains the pattern, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and pattern in (entry / "cmdline").read_bytes().decode(
                errors="replace"
            ).replace("\0", " "):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


class Build:
    """A running build that is followed through its JSON events."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.events: list[dict[str, object]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def until(self, event: str, **members: object) -> None:
        def seen() -> bool:
            wanted = {"event": event, **members}.items()
            return any(wanted <= entry.items() for entry in list(self.events))

        assert eventually(seen, 60), (event, members, self.events)

    def end(self) -> tuple[int, str]:
        assert self.process.stderr is not None
        error = self.process.stderr.read().decode()
        status = self.process.wait(60)
        self._reader.join()
        return status, error

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@pytest.fixture
def start(firebuild: Firebuild, context: Path) -> Iterator[Callable[..., Build]]:
    builds: list[Build] = []

    def start(dockerfile: str, *arguments: str | Path) -> Build:
        (context / "Dockerfile").write_text(dockerfile)
        process = firebuild.popen(
            "rootfs",
            "--no-cache",
            "--dockerfile",
            context / "Dockerfile",
            "--context",
            context,
            "--tag",
            "t/ends:1",
            "--output",
            "tar",
            "--progress",
            "rawjson",
            *arguments,
        )
        builds.append(Build(process))
        return builds[-1]

    yield start
    for build in builds:
        build.close()


@contextmanager
def nothing_left(firebuild: Firebuild) -> Iterator[None]:
    yield
    assert eventually(lambda: firebuild.leftovers() == []), firebuild.leftovers()
    assert eventually(lambda: running(str(firebuild.home)) == []), running(str(firebuild.home))
    assert "t/ends" not in firebuild("images", "list").stdout
    mounts = Path("/proc/self/mounts").read_text()
    assert str(firebuild.home) not in mounts


@pytest.mark.parametrize("phase", range(1, 8))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_any_phase_ends_with_130_and_leaves_nothing(
    firebuild: Firebuild, start: Callable[..., Build], phase: int, number: signal.Signals
) -> None:
    # RSA makes the second phase long enough to be hit; the last phase packs a larger tree.
    dockerfile = "FROM host\nRUN sleep 1\n"
    with nothing_left(firebuild):
        build = start(dockerfile)
        build.until("phase-started", phase=phase)
        os.killpg(build.process.pid, number)
        status, error = build.end()
        assert (status, "Traceback" in error) == (130, False), (status, error)
        assert "interrupted" in error.lower()


def test_a_second_interruption_does_not_break_the_clean_up(
    firebuild: Firebuild, start: Callable[..., Build]
) -> None:
    with nothing_left(firebuild):
        build = start(f"FROM host\nRUN sleep {MARK}\n")
        build.until("step-started", step=2)
        for _ in range(5):
            os.killpg(build.process.pid, signal.SIGINT)
            time.sleep(0.02)
        status, error = build.end()
        assert (status, "Traceback" in error) == (130, False), (status, error)
    assert running(f"sleep {MARK}") == []


def test_a_killed_guest_is_lost_at_once(firebuild: Firebuild, start: Callable[..., Build]) -> None:
    with nothing_left(firebuild):
        build = start(f"FROM host\nRUN sleep {MARK}\n")
        build.until("step-started", step=2)
        guests = [
            pid
            for pid in running("firebuild_bootstrap.guest.main")
            if name_of(pid) != "bwrap" and build.process.pid in ancestors(pid)
        ]
        # What vminit is about to execute still looks like vminit for a moment.
        vminit = min(guests, key=lambda pid: len(ancestors(pid)))
        began = time.monotonic()
        os.kill(vminit, signal.SIGKILL)
        status, error = build.end()
        assert status == 4, error
        assert time.monotonic() - began < 15
    assert running(f"sleep {MARK}") == []


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended, perhaps as part of another test
        return ""


def ancestors(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found.append(pid)
    return found


def test_a_killed_firebuild_leaves_no_process_and_no_file(
    firebuild: Firebuild, start: Callable[..., Build]
) -> None:
    with nothing_left(firebuild):
        build = start(f"FROM host\nRUN sleep {MARK}\n")
        build.until("step-started", step=2)
        build.process.kill()
        status, _ = build.end()
        assert status == -signal.SIGKILL
        assert eventually(lambda: running(f"sleep {MARK}") == [])


def test_a_build_that_takes_too_long_ends_with_its_own_status(
    firebuild: Firebuild, start: Callable[..., Build], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("bootstrap: {build_timeout: 3s}\n")
    with nothing_left(firebuild):
        build = start(f"FROM host\nRUN sleep {MARK}\n", "--config", config)
        status, error = build.end()
        assert status == 5, error
        assert "3s" in error or "build_timeout" in error


def test_a_failed_step_and_bad_input_have_statuses_of_their_own(
    firebuild: Firebuild, start: Callable[..., Build]
) -> None:
    with nothing_left(firebuild):
        build = start("FROM host\nRUN exit 3\n")
        status, _ = build.end()
        assert status == 1
        last = build.events[-1]
        assert {"event": "build-failed", "exit_status": 1, "step": 2, "exit_code": 3}.items() <= (
            last.items()
        )
        build = start("FROM host\nNONSENSE\n")
        assert build.end()[0] == 2


def test_two_builds_at_once_do_not_meet(firebuild: Firebuild, context: Path, tmp_path: Path) -> None:
    processes = []
    for name in ("one", "two"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "Dockerfile").write_text(f"FROM host\nCOPY who /who\nRUN sleep 1; grep {name} /who\n")
        (directory / "who").write_text(name)
        processes.append(
            firebuild.popen(
                "rootfs",
                "--dockerfile",
                directory / "Dockerfile",
                "--context",
                directory,
                "--tag",
                f"t/{name}:1",
                "--output",
                "tar",
            )
        )
    for process in processes:
        out, error = process.communicate(timeout=100)
        assert process.returncode == 0, (out, error)
        assert b"refused" not in out
