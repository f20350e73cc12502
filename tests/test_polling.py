"""Descriptors are waited for whatever their numbers: a program that uses the library may have thousands."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import pytest

from firebuild_bootstrap.image.layertrees import boot_id
from firebuild_bootstrap.machine import cleanup
from firebuild_bootstrap.machine.leftovers import end_process
from firebuild_bootstrap.polling import readable

MANY = 1100


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    """Have so many open that the next has a number that select(2) does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * MANY), hard))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(MANY):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@pytest.fixture
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    reader, writer = os.pipe()
    assert reader >= 1024
    with FileIO(reader) as source, FileIO(writer, "w") as target:
        yield source, target


def test_what_has_data_is_named_at_once_and_in_any_form(pipe: tuple[FileIO, FileIO]) -> None:
    source, target = pipe
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert readable(source, ours, seconds=0) == []
        target.write(b"x")
        assert readable(source.fileno(), ours) == [source.fileno()]
        theirs.send(b"x")
        assert set(readable(source, ours)) == {source.fileno(), ours.fileno()}


def test_an_end_and_a_number_that_is_none_can_be_read_from(pipe: tuple[FileIO, FileIO]) -> None:
    source, target = pipe
    number = target.fileno()
    target.close()
    assert readable(source) == [source.fileno()]
    assert readable(number, seconds=0) == [number]  # reading tells what is wrong


@pytest.mark.parametrize("seconds", [-1.0, 0, 0.0004, 0.2])
def test_it_waits_as_long_as_is_said_and_no_shorter(pipe: tuple[FileIO, FileIO], seconds: float) -> None:
    began = time.monotonic()
    assert readable(pipe[0], seconds=seconds) == []
    assert time.monotonic() - began >= seconds


def test_a_process_that_a_killed_build_left_is_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        stat = tmp_path / "stat"
        stat.write_bytes(Path(f"/proc/{process.pid}/stat").read_bytes())
        assert end_process(stat, boot_id()) == ""
        assert process.wait(10) == -signal.SIGKILL


def test_the_end_of_a_build_is_awaited(pipe: tuple[FileIO, FileIO]) -> None:
    source, target = pipe

    def end() -> None:
        target.write(b"word")
        target.close()

    ending = threading.Timer(0.05, end)
    ending.start()
    assert cleanup.await_end(source.fileno(), parent=os.getppid()) == b"word"
    ending.join()
