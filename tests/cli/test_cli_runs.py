"""`firebuild run --detach`, and what is done with such a run, on the driver local."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cli.conftest import Cli
from firebuild_bootstrap.runs import Runs
from support import BIN, await_end_of_processes, leftovers

pytestmark = pytest.mark.needs("userns")

SERVER = "echo up; echo aside >&2; trap 'echo bye; exit 3' USR1; while :; do sleep 0.05; done"


def detach(home: Path, *arguments: str, status: int = 0) -> str:
    """Run `firebuild run --detach`; return its id, or its error where `status` is not 0."""
    command = [str(BIN / "firebuild"), "run", "--detach", *arguments]
    environ = {**os.environ, "FIREBUILD_HOME": str(home), "FIREBUILD_PULL": "never"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert done.returncode == status, done
    assert not (done.stderr if status == 0 else done.stdout)
    return done.stderr if status else done.stdout.removesuffix("\n")


def test_a_run_goes_on_by_itself_until_it_is_stopped_and_is_kept_until_it_is_removed(host_cli: Cli) -> None:
    Path("Dockerfile").write_text("FROM host\nSTOPSIGNAL SIGUSR1\n")
    host_cli("build", "-q", "-t", "server", ".")
    run = detach(host_cli.home, "--name", "web", "server", "/bin/sh", "-c", SERVER)
    assert host_cli("ps", "-q").out == f"{run}\n"
    assert "up 0s" in host_cli("ps").out
    assert host_cli("rm", "web", status=2).first == f"error: the run {run} has not ended"
    taken = "error: the run {} has the name web\n"
    assert detach(host_cli.home, "--name", "web", "host", "true", status=125).startswith(taken.format(run))

    with subprocess.Popen(
        [BIN / "firebuild", "logs", "--follow", run],
        stdout=subprocess.PIPE,
        env={**os.environ, "FIREBUILD_HOME": str(host_cli.home)},
    ) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline() == b"up\n"
        assert host_cli("stop", "web").out == f"{run}\n"
        assert logs.stdout.read() == b"bye\n"
    assert logs.returncode == 0
    assert (host_cli("ps", "-q").out, host_cli("ps", "--all", "-q").out) == ("", f"{run}\n")
    assert "exited (3) 0s ago" in host_cli("ps", "--all").out
    assert host_cli("wait", "web").out == "3\n"
    done = host_cli("logs", "web")
    assert (done.out, done.err) == ("up\nbye\n", "aside\n")
    assert host_cli("logs", "--tail", "1", "web").out == "bye\n"
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
    assert detach(home, "no-such-image", status=125).startswith("error: unknown base no-such-image")
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
    assert host_cli("ps", "--all").out.splitlines()[1].endswith("  lost")
    assert host_cli("wait", run, status=4).first.startswith(f"error: the run {run} has no exit status")
    host_cli("rm", run)
    assert host_cli.leftovers() == []
