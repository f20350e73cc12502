"""`firebuild run --detach`, and what is done with such a run, on the driver local."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.runs import Runs, _is_watched
from support import BIN, await_end_of_processes, leftovers, unwarned

pytestmark = pytest.mark.needs("userns")

SERVER = "echo up; echo aside >&2; trap 'echo bye; exit 3' USR1; while :; do sleep 0.05; done"

UNTIL_STOPPED = "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done"


def background(*arguments: str, home: Path) -> subprocess.Popen[bytes]:
    """Start `firebuild …`."""
    environ = {**os.environ, "FIREBUILD_HOME": str(home)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([BIN / "firebuild", *arguments], env=environ, **pipes)


def await_that(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def detach(home: Path, *arguments: str, status: int = 0) -> str:
    """Run `firebuild run --detach`; return its id, or its error where `status` is not 0."""
    command = [str(BIN / "firebuild"), "run", "--detach", *arguments]
    environ = {**os.environ, "FIREBUILD_HOME": str(home), "FIREBUILD_PULL": "never"}
    environ["PYTHONWARNINGS"] = "default"  # Python has none about the process that goes on
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.returncode == status, done
    said = unwarned(done.stderr)
    assert not (done.stdout if status else said)
    return said if status else done.stdout.removesuffix("\n")


def test_a_run_goes_on_by_itself_until_it_is_stopped_and_is_kept_until_it_is_removed(host_cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM host\nSTOPSIGNAL SIGUSR1\n")
    host_cli("build", "-q", "-t", "server", ".")
    run = detach(host_cli.home, "--name", "web", "server", "/bin/sh", "-c", SERVER)
    assert host_cli("ps", "-q").out == f"{run}\n"
    assert "up 0s" in host_cli("ps").out
    assert host_cli("rm", "web", status=2).first == f"error: the run {run} has not ended"
    taken = "error: the run {} has the name web\n"
    assert detach(host_cli.home, "--name", "web", "host", "true", status=125).startswith(taken.format(run))

    with background("logs", "--follow", run, home=host_cli.home) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"up\n"
        assert host_cli("stop", "web").out == f"{run}\n"
        assert logs.stdout.read() == b"bye\n"
    assert logs.returncode == 0
    assert (host_cli("ps", "-q").out, host_cli("ps", "--all", "-q").out) == ("", f"{run}\n")
    assert "exited (3) 0s ago" in host_cli("ps", "--all").out
    assert host_cli("wait", "web").out == "3\n"
    done = host_cli("logs", "web")
    assert (done.out, unwarned(done.err)) == ("up\nbye\n", "aside\n")
    assert host_cli("logs", "--tail", "1", "web").out == "bye\n"
    assert host_cli("logs", "--tail", "all", "web").out == host_cli("logs", "web").out
    stamped = host_cli("logs", "--timestamps", "web").out.splitlines()
    assert [line.partition("Z ")[2] for line in stamped] == ["up", "bye"]
    (document,) = json.loads(host_cli("ps", "--all", "--json").out)
    assert (document["state"], document["exit_code"], document["command"][0]) == ("ended", 3, "/bin/sh")
    assert host_cli("rm", "web").out == f"{run}\n"
    assert host_cli("logs", "web", status=2).first == "error: there is no run 'web'"
    assert Runs(host_cli.home).list() == []
    assert host_cli.leftovers() == []


def test_what_fails_before_the_command_begins_is_said_at_once_and_nothing_is_kept(host_cli: Cli) -> None:
    home = host_cli.home
    assert detach(home, "no-such-image", status=125).startswith("error: unknown base or image no-such-image")
    assert detach(home, "host", "no-such", status=127).startswith("error: no-such: not found in PATH=")
    assert detach(home, "-i", "host", status=125).startswith("error: --detach: a run in the background")
    assert host_cli("run", "--name", "web", "host", status=125).first.startswith(
        "error: --name is for --detach"
    )
    assert Runs(home).list() == []
    assert host_cli.leftovers() == []


def test_a_run_that_ends_at_once_has_begun_and_one_with_rm_leaves_nothing(host_cli: Cli) -> None:
    run = detach(host_cli.home, "host", "/bin/sh", "-c", "exit 7")
    assert host_cli("wait", run).out == "7\n"
    host_cli("rm", run)
    run = detach(host_cli.home, "--rm", "host", "/bin/sh", "-c", "sleep 0.3; exit 5")
    assert host_cli("wait", run).out == "5\n"
    run = detach(host_cli.home, "--rm", "host", "/bin/sh", "-c", "echo up; exec sleep 1000")
    assert host_cli("stop", "--time", "60", run).out == f"{run}\n"
    await_end_of_processes(host_cli.home)
    assert Runs(host_cli.home).list() == []
    assert leftovers(host_cli.home) == []


def test_a_command_that_does_not_heed_is_ended_with_its_machine(host_cli: Cli) -> None:
    run = detach(host_cli.home, "host", "/bin/sh", "-c", "trap '' TERM; echo up; exec sleep 1000")
    host_cli("rm", "--force", run)
    assert Runs(host_cli.home).list() == []
    assert host_cli.leftovers() == []


def test_a_run_whose_process_is_killed_is_lost_and_its_machine_is_gone(host_cli: Cli) -> None:
    run = detach(host_cli.home, "host", "/bin/sh", "-c", "echo up; exec sleep 1000")
    os.kill(Runs(host_cli.home).find(run).record.pid, signal.SIGKILL)
    await_end_of_processes(host_cli.home)
    assert host_cli("ps", "--all").out.splitlines()[1].split()[-2:] == ["lost", "-"]
    waited = host_cli("wait", run, status=4)
    assert waited.out == "-\n"
    assert waited.first == f"error: the run {run} has no exit status: the process was killed"
    host_cli("rm", run)
    assert host_cli.leftovers() == []


def test_one_that_is_lost_or_goes_on_keeps_nobody_from_the_others(host_cli: Cli) -> None:
    home, lost = host_cli.home, ("lost", "lost2")
    for name in lost:
        detach(home, "--name", name, "host", "/bin/sh", "-c", "exec sleep 1000")
        os.kill(Runs(home).find(name).record.pid, signal.SIGKILL)
    first = detach(home, "host", "/bin/sh", "-c", "exit 3")
    last = detach(home, "--name", "last", "host", "/bin/sh", "-c", UNTIL_STOPPED)
    gone = detach(home, "--rm", "--name", "gone", "host", "/bin/sh", "-c", UNTIL_STOPPED)
    with background("wait", first, *lost, last, gone, first, home=home) as wait:
        await_that(lambda: _is_watched(Runs(home).find(gone).directory))
        host_cli("stop", gone)
        await_that(lambda: gone not in [run.record.id for run in Runs(home).list()])
        host_cli("stop", last)
        out, error = wait.communicate(timeout=60)
    assert out == b"3\n-\n-\n5\n5\n"
    ids = [Runs(home).find(name).record.id for name in lost]
    words = f"error: the runs {', '.join(ids)} have no exit status: the process was killed\n"
    assert (error.decode(), wait.returncode) == (words, 4)
    alive = [detach(home, "host", "/bin/sh", "-c", "exec sleep 1000") for _ in range(2)]
    done = host_cli("rm", alive[0], "lost", alive[1], first, status=2)
    assert done.out == f"{ids[0]}\n{first}\n"
    assert [line.partition(": ")[2] for line in done.err.splitlines() if line.startswith("error")] == [
        f"the run {run} has not ended" for run in alive
    ]
    host_cli("rm", "--force", *alive, "lost2", last)
    assert Runs(home).list() == []
    assert host_cli.leftovers() == []


def test_runs_are_stopped_side_by_side(host_cli: Cli) -> None:
    home = host_cli.home
    deaf = detach(home, "host", "/bin/sh", "-c", "trap '' TERM; exec sleep 1000")
    other = detach(home, "host", "/bin/sh", "-c", UNTIL_STOPPED)
    with background("stop", "--time", "86400", deaf, other, home=home) as stop:
        assert host_cli("wait", other).out == "5\n"
        assert host_cli("ps", "-q").out == f"{deaf}\n"
        host_cli("rm", "--force", deaf)
        out, error = stop.communicate(timeout=60)
    assert (out.decode(), error, stop.returncode) == (f"{deaf}\n{other}\n", b"", 0)
    host_cli("rm", other)


def all_arguments() -> list[bytes]:
    """Of every process of this host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            found.append(path.read_bytes())
    return found


def test_nobody_reads_in_the_arguments_of_a_process_what_a_run_was_given(host_cli: Cli) -> None:
    token, password, command, name = (secrets.token_hex(8) for _ in range(4))
    Path("env").write_text(f"PASSWORD={password}\n")
    given = ("-e", f"TOKEN={token}", "--env-file", "env", "--identity", f"{name}.example")
    more = ("--identity-command", f"/bin/echo {command}")
    script = "echo $TOKEN $PASSWORD; exec sleep 1000"
    run = detach(host_cli.home, *given, *more, "host", "/bin/sh", "-c", script)
    with background("logs", "--follow", run, home=host_cli.home) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == f"{token} {password}\n".encode()
        lines = all_arguments()
        host_cli("rm", "--force", run)
    assert any(b"firebuild_bootstrap.cli.background" in line for line in lines)
    assert not [line for line in lines for text in (token, password, command, name) if text.encode() in line]
