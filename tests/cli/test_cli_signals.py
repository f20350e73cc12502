"""Ctrl-C at any moment of any command: status 130, no traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import ExitStatus
from support import catches, unmeasured

PROGRAM = "import sys; from firebuild_bootstrap.cli import main; sys.argv[0] = 'firebuild'; sys.exit(main())"
DELAYS = (0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6, 0.9, 1.4)


def start(home: Path, *arguments: str, nohup: bool = False) -> subprocess.Popen[bytes]:
    """Start the command and wait until it handles signals; Python alone handles no SIGTERM."""
    process = subprocess.Popen(
        [*(("nohup",) if nohup else ()), sys.executable, "-c", PROGRAM, *arguments],
        env={**unmeasured(), "FIREBUILD_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while process.poll() is None and not catches(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.001)
    return process


def end_of(process: subprocess.Popen[bytes]) -> bytes:
    """What it wrote on standard error until it ended, which is soon; nothing of it is left in any case."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def dockerfile(tmp_path: Path) -> Path:
    path = tmp_path / "context" / "Dockerfile"
    path.parent.mkdir()
    path.write_text("FROM scratch\nCOPY Dockerfile /\n")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("rootfs", "--tag", "a/b:1", "--output", "tar", "--context"),
        ("ca", "check"),
        ("ca", "issue", "--server", "b1", "--guest", "b1", "--out"),
        ("images", "list"),
        ("base", "from-host", "x"),
        ("config", "check"),
        ("--help",),
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_ctrl_c_ends_a_command_whenever_it_comes(
    tmp_path: Path, dockerfile: Path, arguments: tuple[str, ...]
) -> None:
    if arguments[-1] in ("--context", "--out"):
        arguments = (*arguments, str(dockerfile.parent))
    interrupted = 0
    for delay in DELAYS:
        process = start(tmp_path / "home", *arguments)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        err = end_of(process)
        assert b"Traceback" not in err, err
        assert b"Exception ignored" not in err, err
        assert process.returncode in (ExitStatus.INTERRUPTED, 0, ExitStatus.BAD_INPUT), (delay, err)
        if delay == 0:
            assert process.returncode == ExitStatus.INTERRUPTED, err
        if process.returncode != ExitStatus.INTERRUPTED:
            break  # it had ended before, in whatever way, as it does with longer delays
        interrupted += 1
    assert interrupted > 0
    assert not [path for path in tmp_path.glob("home/builds/*") if path.name != "lock"]


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("COPY huge /", ()),
        ("ADD http://{}/file /", ()),
        ("ADD http://{}/x.git /", ()),
        ("ADD git://{}/x.git /", ()),
        ("COPY --from=c f /", ("--build-context", "c=git://{}/x.git")),
    ],
)
def test_ctrl_c_does_not_wait_until_what_a_build_takes_in_is_read(
    tmp_path: Path, dockerfile: Path, line: str, options: tuple[str, ...]
) -> None:
    with open(dockerfile.parent / "huge", "wb") as huge:
        huge.truncate(1 << 40)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        dockerfile.write_text(f"FROM scratch\n{line.format(place)}\n")
        words = [option.format(place) for option in options]
        process = start(tmp_path / "home", "build", *words, str(dockerfile.parent))
        with ExitStack() as answering:
            if place in " ".join((dockerfile.read_text(), *words)):
                answering.enter_context(silent.accept()[0])  # and not a word
            else:
                time.sleep(2)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            err = end_of(process)
    assert process.returncode == ExitStatus.INTERRUPTED, err
    assert b"interrupted" in err
    assert b"interrupted again" not in err
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_do_the_same(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "home", "images", "list")
    process.send_signal(number)
    assert end_of(process) == b""
    assert process.returncode == ExitStatus.INTERRUPTED


def test_a_command_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    process = start(tmp_path / "home", "images", "list", nohup=True)
    process.send_signal(signal.SIGHUP)
    end_of(process)
    assert process.returncode == 0


@pytest.mark.needs("userns")
def test_a_command_learns_how_programs_end_whatever_its_parent_ignores(
    tmp_path: Path, dockerfile: Path
) -> None:
    ignoring = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{ignoring}; {PROGRAM}",
            "build",
            "-t",
            "a",
            "-o",
            "tar",
            str(dockerfile.parent),
        ],
        env={**unmeasured(), "FIREBUILD_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_imported_before_signals_are_handled() -> None:
    program = (
        "import os, re, signal, sys; before = set(sys.modules)\n"
        "import firebuild_bootstrap.cli\n"
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"__future__", "firebuild_bootstrap", "firebuild_bootstrap.cli"}


def crash(directory: Path, code: str) -> tuple[bool, list[str]]:
    """Run code without a limit on core dumps, crash it when it says so, and look for a dump and files."""
    script = 'ulimit -H -c unlimited; ulimit -S -c unlimited; exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, "FIREBUILD_HOME": str(directory / "home")},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSEGV)
    _, status = os.waitpid(process.pid, 0)
    process.returncode = status
    process.stdout.close()
    assert os.WTERMSIG(status) == signal.SIGSEGV
    return os.WCOREDUMP(status), [path.name for path in directory.iterdir() if path.name != "home"]


def test_a_process_that_may_hold_keys_leaves_no_core_dump(tmp_path: Path) -> None:
    waiting = "print('ready', flush=True); import time; time.sleep(60)"
    (tmp_path / "python").mkdir()
    (tmp_path / "firebuild").mkdir()
    dumped, _ = crash(tmp_path / "python", waiting)
    if not dumped:
        pytest.skip("this host makes no core dumps: ulimit -H -c or kernel.core_pattern forbid them")
    command = f"from firebuild_bootstrap.cli import app; app.report = lambda _: exec({waiting!r})\n"
    code = f"import sys; sys.argv[1:] = ['no-such-command']\n{command}app.main()"
    assert crash(tmp_path / "firebuild", code) == (False, [])
