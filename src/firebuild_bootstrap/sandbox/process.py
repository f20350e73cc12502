"""A program that runs in a sandbox, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import IO, Final

from firebuild_bootstrap.polling import readable

_START_SECONDS: Final = 2.0
_GONE_SECONDS: Final = 10.0  # a killed PID namespace is gone in milliseconds; longer means a stuck disk


class SandboxProcess:
    """A running sandbox: bubblewrap outside, the program and its children in a PID namespace of their own.

    bubblewrap dies with the THREAD that started it (PR_SET_PDEATHSIG, prctl(2)). So each sandbox has a
    thread of its own, which starts it and waits for it: it ends when the sandbox does, or with the
    process, however that ends.
    """

    def __init__(self, process: subprocess.Popen[bytes], init_pid: int) -> None:
        self.process = process
        self._init_pid = init_pid
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._outer = _pidfd(process.pid)
        self._init = _pidfd(init_pid)

    @property
    def stdout(self) -> IO[bytes] | None:
        """What the program writes, when that is a pipe."""
        return self.process.stdout

    @property
    def stderr(self) -> IO[bytes] | None:
        """What the program complains, when that is a pipe of its own."""
        return self.process.stderr

    def reap(self) -> None:
        """Wait for the end, on the thread that started the sandbox."""
        self.process.wait()
        # bubblewrap's end is that of its namespace, but for the moments before the ids are mapped.
        self._send_kill()
        with self._lock:
            self._done.set()
            if self._outer is not None:
                os.close(self._outer)
                self._outer = None

    def poll(self) -> int | None:
        """Return the exit status, 128 + N after signal N, or None while the program runs."""
        if not self._done.is_set():
            return None
        status = self.process.returncode
        return status if status >= 0 else 128 - status

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait up to `timeout` seconds for the end and return what `poll` says then."""
        self._done.wait(timeout)
        return self.poll()

    def terminate(self) -> None:
        """Ask the program (not its sandbox) to end, with SIGTERM."""
        program = None
        began = time.monotonic()
        # bubblewrap needs a moment to get as far as the program.
        while program is None and not self._done.wait(0.01) and time.monotonic() - began < _START_SECONDS:
            program = _first_child(self._init_pid)
        if program is not None:
            with suppress(ProcessLookupError):
                os.kill(program, signal.SIGTERM)

    def kill(self) -> None:
        """End the program and everything it started; returns when all of it is gone. Idempotent."""
        self._send_kill()
        self.wait(_GONE_SECONDS)
        self._await_namespace()

    def abandon(self) -> None:
        """End what could not be set up, on the thread that started it."""
        self._send_kill()
        self.reap()
        self.close()

    def close(self) -> None:
        """Close the pipes to the program and forget its namespace; it has to have ended. Idempotent."""
        self._await_namespace()
        close_streams(self.process)

    def _send_kill(self) -> None:
        with self._lock:
            for descriptor in (self._init, self._outer):
                if descriptor is not None:
                    with suppress(ProcessLookupError):
                        signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _await_namespace(self) -> None:
        # The first process of a PID namespace is gone only after every other one (pid_namespaces(7)).
        with self._lock:
            descriptor, self._init = self._init, None
        if descriptor is not None:
            readable(descriptor, seconds=_GONE_SECONDS)
            os.close(descriptor)


def close_streams(process: subprocess.Popen[bytes]) -> None:
    """Close what is left open of the pipes to `process`."""
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with suppress(BrokenPipeError):  # what it never read
                stream.close()


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _first_child(parent: int) -> int | None:
    children: list[tuple[int, int]] = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # After the command in parentheses: state, parent, … and the start time as the 20th.
                words = stat.read().rpartition(b")")[2].split()
                if int(words[1]) == parent:
                    children.append((int(words[19]), int(name)))
    return min(children)[1] if children else None
