"""`firebuild ca bench`: what the configured CA issues a second, as far as it came."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest

from cli.conftest import Cli
from cli.test_cli_signals import start
from firebuild_bootstrap.errors import ExitStatus
from firebuild_pki import CASettings
from firebuild_pki.benching import Plan, Tally, Work, measure, spread
from support import BIN


def test_the_embedded_ca_is_measured_and_leaves_nothing_behind(cli: Cli) -> None:
    done = cli("ca", "bench", "--count", "3", "--concurrency", "2")
    assert done.err.splitlines() == [
        "This really issues: up to 6 certificates, through the provider embedded, for builds that do not "
        "exist (bench-…).",
        "Nothing has to be cleaned up: its CAs end with each build.",
    ]
    lines = done.out.splitlines()
    assert lines[0].startswith("6 certificates in ")
    assert lines[0].endswith(" a second (1 process of 2 threads)")
    assert [line.split()[0] for line in lines[1:4]] == ["ms", "certificate", "build"]
    assert lines[-1] == "errors: 0"


def test_one_end_is_issued_from_an_authority_that_stays_open(cli: Cli) -> None:
    found = json.loads(cli("ca", "bench", "--profile", "server", "--count", "5", "--json").out)
    assert (found["certificates"], found["builds"], found["build_ms"], found["errors"]) == (5, 0, None, {})


def test_what_is_wrong_is_told_before_anything_is_issued(cli: Cli) -> None:
    done = cli("ca", "bench", "--duration", "soon", status=ExitStatus.BAD_INPUT)
    assert "--duration: expected a duration such as 90s or 1h30m" in done.err
    done = cli("ca", "bench", "--ca", "nowhere", status=ExitStatus.BAD_INPUT)
    assert "really issues" not in done.err
    cli("ca", "bench", "--count", "0", status=ExitStatus.BAD_INPUT)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_prints_what_there_is(tmp_path: Path, processes: str) -> None:
    arguments = ("ca", "bench", "--count", "1000000", "--processes", processes)
    process = start(tmp_path, *arguments)
    assert process.stderr is not None
    process.stderr.readline()  # it is about to begin
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == ExitStatus.INTERRUPTED
    lines = out.decode().splitlines()
    assert lines[0] == "interrupted: these are the figures until then"
    assert " certificates in " in lines[1]
    assert lines[-1] == "errors: 0"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_program_ends_without_a_complaint_of_python(tmp_path: Path, processes: str) -> None:
    command = [str(BIN / "firebuild"), "ca", "bench", "--count", "5", "--processes", processes]
    environ = {"PATH": "/usr/bin:/bin", "FIREBUILD_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "errors: 0"
    assert len(done.stderr.splitlines()) == 2  # what it leaves behind, and how that is cleaned up


def settings() -> CASettings:
    return CASettings.model_validate({})


def refuse(_: int) -> None:
    raise RuntimeError("enough")


def test_after_the_duration_nothing_more_is_begun() -> None:
    found = measure(settings, Plan(Work.GUEST, 1_000_000, duration=timedelta(milliseconds=50)))
    assert 0 < len(found.tally.certificates) < 1_000_000
    assert not found.interrupted


def test_whoever_ends_it_gets_what_was_done() -> None:
    begun: list[int] = []

    def check() -> None:
        if begun:
            raise RuntimeError("enough")

    found = measure(settings, Plan(count=1_000_000), check, begun.append)
    assert found.interrupted
    assert found.tally.errors == {}


def test_what_is_no_interruption_is_an_error_and_leaves_no_thread() -> None:
    with pytest.raises(RuntimeError, match="enough"):
        measure(settings, Plan(count=1_000_000), on_begun=refuse)
    assert [one.name for one in threading.enumerate() if one.name.startswith("bench")] == []


def vanish() -> CASettings:
    import multiprocessing
    import os

    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return settings()


def test_a_process_that_vanishes_is_an_error() -> None:
    found = measure(vanish, Plan(count=2, processes=2))
    assert found.tally.errors == {"a process of the measurement ended with status 9": 2}


def test_quantiles_are_of_the_nearest_rank() -> None:
    assert spread([]) is None
    assert spread([0.003]) == {"p50": 3.0, "p99": 3.0, "max": 3.0}
    thousand = [one / 1000 for one in range(1000, 0, -1)]
    assert spread(thousand) == {"p50": 500.0, "p99": 990.0, "max": 1000.0}


def test_errors_of_many_builds_are_one_kind_and_kinds_have_an_end() -> None:
    tally = Tally()
    for number in range(3):
        tally.fail(f"bench-0a1b2c-{number}.firebuild.internal was refused")
    assert tally.errors == {"….firebuild.internal was refused": 3}
    for number in range(100):
        tally.fail(f"fault {number}")
    assert len(tally.errors) == 21
    other = Tally(errors=Counter({"fault 0": 2, "new": 1}))
    tally.add(other)
    assert (tally.errors["fault 0"], tally.errors["other errors"]) == (3, 82)
