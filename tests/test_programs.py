"""Programs that are run are bounded in what they write, in their time and in their memory."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.programs import MOST_OUTPUT, LimitExceeded, run_program
from firebuild_bootstrap.sandbox import detect


def run(script: str, *words: str, **options: Any) -> tuple[int, bytes, bytes]:
    done = run_program(["/bin/sh", "-c", script, "sh", *words], **options)
    return done.returncode, done.stdout, done.stderr


def test_a_program_gets_its_input_and_its_status_and_words_come_back(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000  # many times what a pipe holds
    assert run("cat; echo no >&2; exit 3", data=data) == (3, data, b"no\n")
    status, output, _ = run("pwd; umask; echo $A", cwd=tmp_path, umask=0o027, env={"A": "b"})
    assert (status, output.split()) == (0, [str(tmp_path).encode(), b"0027", b"b"])


def test_a_program_need_not_read_its_input_nor_keep_its_output_open() -> None:
    assert run("exit 0", data=bytes(1 << 20)) == (0, b"", b"")
    assert run("exec >&- 2>&- <&-; sleep 0.3; exit 4", data=bytes(1 << 20))[0] == 4


def test_where_children_have_no_status_nothing_is_taken_for_a_success() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(MachineError, match="this process ignores SIGCHLD"):
            run("exit 3")
        with pytest.raises(MachineError, match="this process ignores SIGCHLD"):
            detect()
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_program_that_writes_too_much_is_ended(stream: str) -> None:
    with pytest.raises(LimitExceeded, match="it wrote more than 1048576 bytes"):
        run(f"yes {stream}")
    assert len(run(f"head -c {MOST_OUTPUT} /dev/zero")[1]) == MOST_OUTPUT


def test_a_program_that_does_not_end_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match=r"it did not end within 0\.3 seconds"):
        run("sleep 600 & echo $! > pid; wait", cwd=tmp_path, seconds=0.3)
    assert ended(tmp_path / "pid")


def test_what_a_program_leaves_behind_is_not_waited_for_and_ended(tmp_path: Path) -> None:
    assert run("sleep 600 & echo $! > pid; echo done", cwd=tmp_path) == (0, b"done\n", b"")
    assert ended(tmp_path / "pid")


def test_a_check_that_fails_ends_the_program(tmp_path: Path) -> None:
    def check() -> None:
        if (tmp_path / "pid").exists():
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        run("echo $$ > new; mv new pid; exec sleep 600", cwd=tmp_path, check=check)
    assert ended(tmp_path / "pid")


def test_memory_is_limited_for_all_that_the_program_starts() -> None:
    take = "import sys; print(len(bytearray(int(sys.argv[1]))))"
    script = f"/usr/bin/env python3 -c '{take}' $1; exit $?"
    assert run(script, str(8 << 20), memory=256 << 20)[0] == 0
    status, _, complaints = run(script, str(512 << 20), memory=256 << 20)
    assert status == 1
    assert b"MemoryError" in complaints


def ended(file: Path) -> bool:
    """Whether the process whose number `file` holds ends."""
    stat = Path("/proc", file.read_text().strip(), "stat")
    for _ in range(1000):
        try:
            state = stat.read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_guest_learns_how_its_commands_end_whatever_its_parent_ignores_or_blocks() -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD]);"
        "from firebuild_bootstrap.guest.main import main; main(['--print-flags']);"
        "import subprocess; print(subprocess.run(['false']).returncode);"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    status, output, _ = run('exec "$@"', sys.executable, "-c", code)
    assert (status, output.splitlines()[-2:]) == (0, [b"1", b"set()"])
