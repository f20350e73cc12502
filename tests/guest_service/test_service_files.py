"""vminit as a service: files that systemd and OpenRC take, and flags that arrive as they were given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from firebuild_bootstrap.guest.errors import InputError
from firebuild_bootstrap.guest.main import main
from firebuild_bootstrap.guest.units import UNITS, print_flags, print_unit
from support import BIN, REPO

SERVICES = [name for name in UNITS if name.endswith(".service")]
SCRIPTS = [name for name in UNITS if name.endswith(".initd")]
# The rest of an OpenRC, as far as these scripts need it (openrc-run(8)).
_OPENRC_RUN = """
ebegin() { echo "begin: $*"; }
eend() { echo "end: $1"; return "$1"; }
eerror() { echo "error: $*"; }
checkpath() { echo "checkpath: $*"; }
RC_SVCNAME=$1
. "$2"
"""


def script(tmp_path: Path, name: str, program: Path, runner: Path) -> Path:
    path = tmp_path / name
    path.write_text(print_unit(name, str(runner), program=str(program)))
    return path


def openrc(script: Path, function: str, **environ: str) -> tuple[int, str]:
    command = f"{_OPENRC_RUN}\n{function}"
    done = subprocess.run(
        ["busybox", "sh", "-uc", command, "sh", "vminit", script],
        env={"PATH": "/usr/bin:/bin", "VMINIT_FLAGS": "", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "", done.stderr
    return done.returncode, done.stdout


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A program that says what it was called with."""
    path = tmp_path / "vminit"
    path.write_text('#!/bin/sh\nprintf "%s|" "$@"\nexit ${STATUS:-0}\n')
    path.chmod(0o755)
    return path


@pytest.mark.needs("systemd")
@pytest.mark.root  # it makes /run/systemd where systemd does not run
def test_systemd_takes_the_units(tmp_path: Path, recorder: Path) -> None:
    paths = [script(tmp_path, name, recorder, recorder) for name in SERVICES]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    own = [line for line in done.stderr.splitlines() if "vminit" in line]
    assert (done.returncode, own) == (0, []), done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shells_take_the_scripts(tmp_path: Path, recorder: Path, name: str) -> None:
    path = script(tmp_path, name, recorder, recorder)
    for shell in (["sh"], ["bash"], ["busybox", "sh"]):
        if shutil.which(shell[0]):
            subprocess.run([*shell, "-n", path], check=True)


@pytest.mark.needs("shellcheck")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(tmp_path: Path, recorder: Path, name: str) -> None:
    path = script(tmp_path, name, recorder, recorder)
    # OpenRC reads variables that the script itself does not use
    subprocess.run(["shellcheck", "--shell=sh", "--exclude=SC2034", path], check=True)


@pytest.mark.needs("busybox")
def test_openrc_runs_vminit_with_its_flags_and_sees_its_failure(tmp_path: Path, recorder: Path) -> None:
    path = script(tmp_path, "vminit.initd", recorder, recorder)
    flags = "--mmds=http://10.0.0.1 --mmds-timeout=5"
    begin = "begin: Configuring this machine from its metadata\n"
    assert openrc(path, "start", VMINIT_FLAGS=flags) == (
        0,
        f"{begin}configure|--mmds=http://10.0.0.1|--mmds-timeout=5|end: 0\n",
    )
    assert openrc(path, "start", STATUS="2") == (2, f"{begin}configure|end: 2\n")


@pytest.mark.needs("busybox")
def test_openrc_starts_an_entrypoint_only_where_there_is_one(tmp_path: Path, recorder: Path) -> None:
    path = script(tmp_path, "vminit-entrypoint.initd", recorder, recorder)
    said = "checkpath: --file --mode 0640 /var/log/vminit.log\n/bin/sh /run/vminit.pid\n"
    assert openrc(path, 'start_pre; echo "$command $pidfile"') == (0, said)
    assert openrc(path, 'echo "$command_args"') == (0, f"-c 'exec {recorder} >>/var/log/vminit.log 2>&1'\n")
    path = script(tmp_path, "vminit-entrypoint.initd", recorder, tmp_path / "none")
    status, said = openrc(path, "start_pre")
    assert (status, said.partition(":")[0]) == (1, "error")
    assert "name nothing to run" in said


@pytest.mark.needs("busybox")
@pytest.mark.parametrize("name", SCRIPTS)
def test_openrc_is_told_what_comes_first(tmp_path: Path, recorder: Path, name: str) -> None:
    told = "need() { echo need $*; }; after() { :; }; before() { :; }"
    status, said = openrc(script(tmp_path, name, recorder, recorder), f"{told}; depend")
    assert (status, said) == (0, "" if name == "vminit.initd" else "need vminit\n")


def test_flags_come_out_of_a_shell_as_they_went_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--mmds", "http://[fd00::1]:8080", "--mmds-timeout", "2.5", "--hosts-file", "/etc/h"]
    assert main([*given, "--print-flags"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('VMINIT_FLAGS="--root=/ --mmds=http://[fd00::1]:8080 --mmds-timeout=2.5 ')
    (tmp_path / "flags").write_text(printed)
    script = f'. {tmp_path}/flags; set -f; exec "$@" $VMINIT_FLAGS --print-flags'
    again = subprocess.run(
        ["sh", "-c", script, "sh", BIN / "vminit"], capture_output=True, text=True, check=True
    )
    assert again.stdout == printed


def test_a_unit_names_this_vminit_and_its_runner() -> None:
    done = subprocess.run(
        [BIN / "vminit", "--print-unit", "vminit-entrypoint.service", "--runner-file", "/opt/run"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ExecStart=/opt/run\n" in done.stdout
    done = subprocess.run(
        [BIN / "vminit", "--print-unit", "vminit.service"], capture_output=True, text=True, check=True
    )
    assert f"ExecStart={BIN}/vminit configure $VMINIT_FLAGS\n" in done.stdout


def test_started_in_another_way_vminit_is_expected_in_its_usual_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/main.py"])
    assert "ExecStart=/usr/bin/vminit " in print_unit("vminit.service", "/x")


@pytest.mark.parametrize("value", ["", "a b", "a\n", 'a"b', "$(id)", "100%", "ä"])
def test_a_value_that_a_service_file_would_read_otherwise_is_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="can't be in a service file"):
        print_flags({"--root": value})
    assert main(["--print-unit", "vminit-entrypoint.service", "--runner-file", value]) == 2
    assert "can't be in a service file" in capsys.readouterr().err


def test_configuring_needs_neither_grpc_nor_protobuf() -> None:
    blocked = "import sys; sys.modules['grpc'] = sys.modules['google'] = None"
    used = "import firebuild_bootstrap.guest.main, firebuild_bootstrap.guest.configure"
    subprocess.run([sys.executable, "-c", f"{blocked}; {used}"], check=True)


def test_there_are_no_other_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-unit", "../main.py"])
    assert "invalid choice" in capsys.readouterr().err


def test_the_wheel_holds_the_files() -> None:
    packed = {file.distribution_path for file in WheelBuilder(str(REPO)).recurse_included_files()}
    assert {f"firebuild_bootstrap/guest/service/{name}" for name in UNITS} <= packed
