"""What a build looks like on a terminal: real builds, on one whose screen can be read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyte
import pytest

from cli.conftest import Cli
from cli.terminals import on_terminal
from firebuild_bootstrap.sandbox import detect
from support import BIN, leftovers

pytestmark = pytest.mark.needs("userns")

COLUMNS, ROWS = 77, 33
ERASED = "\r\x1b[0m\x1b[J"
LONG = "sleep 600 # " + "and so on " * 20


def built(
    home: Path, dockerfile: str, *, until: str = "", key: str = "", **environ: str
) -> tuple[int, list[str]]:
    """Build on a terminal, type a key when a text is there, and return the status and the screen.

    Before the key there is a Ctrl-Z; nobody is there to let a program go on, so that none stops here.
    """
    Path("Dockerfile").write_text(dockerfile)
    environ = {**os.environ, "TERM": "xterm", "FIREBUILD_HOME": str(home), **environ}
    with on_terminal(BIN / "firebuild", "build", "-t", "t", ".", environ=environ) as terminal:
        said = ""
        if until:
            said = terminal.read(until)
            terminal.type("\x1a")
            said += terminal.read(ERASED)
            said += terminal.read(until)
            terminal.type(key)
        said += terminal.read()
        assert terminal.keys() == "handled"
        status = terminal.status()
    screen = pyte.Screen(COLUMNS, ROWS)
    pyte.Stream(screen).feed(said)
    assert not screen.cursor.hidden
    assert screen.cursor.x == 0
    # Times have more digits where the machine has more to do.
    lines = [re.sub(r"\d+\.\ds|build \w+,", "N", line.rstrip()) for line in screen.display]
    lines = [re.sub(r"(and so on) .*…", r"\1…", line) for line in lines]
    # What a user without subordinate ids is told, in lines as long as the terminal is wide.
    warning = f"warning: {detect().note}"
    warned = {warning[at : at + COLUMNS].rstrip() for at in range(0, len(warning), COLUMNS)}
    return status, [line for line in lines if line and line not in warned]


def shown(lines: list[str]) -> list[str]:
    """Leave out that a phase takes, or took, more than a second, which a slow machine tells."""
    return [line for line in lines if not re.fullmatch(r"[a-z][^:]* …|(?!error)[a-z][^:]*: N.*", line)]


def test_a_failed_step_is_shown_whole_and_once_below_what_was_stopped(host_cli: Cli) -> None:
    status, lines = built(
        host_cli.home,
        f"FROM host AS a\nRUN {LONG}\n"
        "FROM host AS b\nRUN seq 20; printf '\\033[2Jbad\\n' >&2; exit 3\n"
        "FROM scratch\nCOPY --from=a / /\nCOPY --from=b / /\n",
    )
    assert status == 1
    failure = lines.index(r"[b 4/7] RUN seq 20; printf '\033[2Jbad\n' >&2; exit 3")
    assert lines[failure + 1 :] == [
        *map(str, range(1, 21)),
        r"\x1b[2Jbad",
        "[b 4/7] failed after N, exit code 3",
        "error: Dockerfile:4: step 4/7 failed with exit code 3",
        r"  RUN seq 20; printf '\033[2Jbad\n' >&2; exit 3",
    ]
    # It may not have begun yet.
    above = [line for line in lines[:failure] if "RUN" in line]
    assert above in ([], ["[a 2/7] RUN sleep 600 # and so on…  stopped after N"])
    assert leftovers(host_cli.home) == []


def test_ctrl_z_erases_the_block_and_ctrl_c_says_what_was_stopped(host_cli: Cli) -> None:
    status, lines = built(host_cli.home, f"FROM host\nRUN echo begun; {LONG}\n", until="  begun", key="\x03")
    assert status == 130
    assert shown(lines) == [
        "Building t:latest (N CA embedded)",
        "[1/2] FROM host  N",
        "[2/2] RUN echo begun; sleep 600 # and so on…  stopped after N",
        "error: the build was interrupted (SIGINT)",
    ]


def test_docker_users_have_their_variable(host_cli: Cli) -> None:
    status, lines = built(host_cli.home, "FROM host\nRUN echo hello\n", BUILDKIT_PROGRESS="plain")
    assert status == 0
    assert shown(lines)[1:6] == [
        "[1/2] FROM host",
        "[1/2] done in N",
        "[2/2] RUN echo hello",
        "hello",
        "[2/2] done in N",
    ]
