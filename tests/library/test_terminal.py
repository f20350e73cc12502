"""The live renderer on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import threading
import time
from collections.abc import Callable

import pytest

from firebuild_bootstrap.events import StepFinished, StepOutput, StepStarted
from firebuild_bootstrap.progress import TerminalRenderer

RUN = StepStarted(step=2, total=2, instruction="RUN make", line=2)


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def clocks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_a_terminal_that_goes_away_stops_the_clock_and_fails_the_next_event(
    capfd: pytest.CaptureFixture[str],
) -> None:
    user, program = pty.openpty()
    with os.fdopen(program, "wb", buffering=0) as out:
        renderer = TerminalRenderer(out)
        renderer(RUN)
        os.close(user)
        assert eventually(lambda: clocks() == [])
        with pytest.raises(OSError, match="Input/output error"):
            renderer(StepOutput(step=2, stream="stdout", data=b"more\n"))
        with pytest.raises(OSError, match="Input/output error"):
            renderer.close()
    assert capfd.readouterr().err == ""


def all_of(screen: io.FileIO) -> str:
    """What has been written; a terminal hands it out in pieces."""
    shown = b""
    while select.select([screen], [], [], 0.5)[0]:
        shown += screen.read(4096)
    return shown.decode()


def test_the_clock_stands_still_between_steps() -> None:
    user, program = pty.openpty()
    with os.fdopen(program, "wb", buffering=0) as out, os.fdopen(user, "rb", buffering=0) as screen:
        renderer = TerminalRenderer(out, clock=lambda: 0.0)
        time.sleep(0.7)
        renderer(RUN)
        renderer(StepOutput(step=2, stream="stdout", data=b"one "))
        renderer(StepOutput(step=2, stream="stdout", data=b"two\n"))
        time.sleep(0.7)
        renderer(StepFinished(step=2, exit_code=0, seconds=1))
        renderer.close()
        shown = all_of(screen)
    # On a busy machine the clock may strike once before the first output.
    shown = shown.replace("\r\x1b[K\x1b[1m[2/2] RUN make\x1b[0m \x1b[2m0s\x1b[0m", "")
    header = "\r\x1b[K\x1b[1m[2/2] RUN make\x1b[0m \x1b[0m"
    assert shown == f"{header}{header}\r\none two\r\n\x1b[2m[2/2] done in 1.0s\x1b[0m\r\n"
