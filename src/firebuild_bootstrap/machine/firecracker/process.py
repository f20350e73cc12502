"""A Firecracker process, started here or elsewhere, until its end."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.machine.console import BoundedLog, copied
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi, connect
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.programs import NotStarted, check_children

# FcExitCode of Firecracker (src/vmm/src/lib.rs).
_STATUSES: Final = {
    1: "an error, which it should have told",
    2: "an unexpected error",
    148: "a system call that its filter does not allow",
    149: "SIGBUS",
    150: "SIGSEGV",
    151: "SIGXFSZ",
    152: "a bad configuration",
    153: "arguments that it does not know",
    154: "SIGXCPU",
    155: "SIGPIPE",
    156: "SIGHUP",
    157: "SIGILL",
}
# Writes down who it is, and then becomes the program: there is no moment in which is unknown of it.
_INTRODUCED: Final = 'cat /proc/$$/stat > "$0" && exec "$@"'
_LOG_SECONDS: Final = 2.0
_KILL_SECONDS: Final = 10.0
_PAUSE: Final = 0.05
_SERIAL_BYTES: Final = 64 * 1024


class Process(ABC):
    """A running Firecracker."""

    @abstractmethod
    def wait(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds for its end and say whether it has ended."""

    @abstractmethod
    def kill(self) -> None:
        """End it by force; nothing of it runs afterwards.

        Raises:
            MachineError: it can't be ended.
        """

    def trouble(self) -> str:
        """Say why it ended, where that was not with its guest; empty where only its parent knows."""
        return ""

    @abstractmethod
    def serial(self) -> str:
        """Return the last that it and its guest wrote."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it. Idempotent."""


class StartedProcess(Process):
    """A Firecracker of our own; its standard output is the guest's serial console.

    Args:
        command: what to run.
        directory: where to run it.
        stat_file: gets the line `/proc/PID/stat` of the process, before it becomes the program.
        log: gets a copy of what the process and its guest write, and is closed with it.

    Raises:
        MachineError: it can't be started.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        directory: Path,
        stat_file: Path,
        log: IO[bytes] | None = None,
    ) -> None:
        check_children()
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _INTRODUCED, stat_file, *command],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            if log is not None:
                log.close()
            raise NotStarted(
                command[0], error, "it is started by /bin/sh, in the directory of its machine"
            ) from error
        output: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        self._log = BoundedLog(copied(output, log))

    def wait(self, timeout: float | None) -> bool:
        """See `Process.wait`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.poll() is not None

    def kill(self) -> None:
        """See `Process.kill`."""
        self._process.kill()
        self._process.wait()

    def trouble(self) -> str:
        """See `Process.trouble`."""
        status = self._process.returncode
        return describe_status(status) if status else ""

    def serial(self) -> str:
        """See `Process.serial`."""
        if self._process.poll() is not None:
            self._log.finish(_LOG_SECONDS)
        return self._log.text()

    def close(self) -> None:
        """See `Process.close`."""
        self.kill()
        self._log.finish(_LOG_SECONDS)


class ForeignProcess(Process):
    """A Firecracker that was started elsewhere, known by its API socket.

    Args:
        api: its API.
        serial: a file that holds what its guest writes to the serial console.
    """

    def __init__(self, api: FirecrackerApi, serial: Path | None) -> None:
        self._api = api
        self._serial = serial
        self._handle = _server_of(api.path)

    def wait(self, timeout: float | None) -> bool:
        """See `Process.wait`."""
        if self._handle is not None:
            return bool(readable(self._handle, seconds=timeout))
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self._answers():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE)
        return True

    def kill(self) -> None:
        """See `Process.kill`."""
        if self._handle is not None:
            with suppress(OSError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
        if not self.wait(_KILL_SECONDS):
            raise MachineError(
                f"the Firecracker at {self._api.path} does not end", hint="end it: its guest may still run"
            )

    def serial(self) -> str:
        """See `Process.serial`."""
        if self._serial is None:
            return ""
        try:
            with self._serial.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _SERIAL_BYTES))
                return file.read().decode("utf-8", "replace")
        except OSError as error:
            return f"(the serial log {self._serial} can't be read: {error.strerror})"

    def close(self) -> None:
        """See `Process.close`."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _answers(self) -> bool:
        try:
            connect(self._api.path, _PAUSE).close()
        except (TimeoutError, BlockingIOError):  # busy; with too many callers in front of us
            return True
        except OSError:
            return False
        return True


def describe_status(status: int) -> str:
    """Say how a Firecracker ended that failed."""
    if status < 0:
        return f"firecracker was ended by {signal.Signals(-status).name}"
    why = _STATUSES.get(status)
    return f"firecracker ended with status {status}" + (f" ({why})" if why else "")


def _server_of(path: Path) -> int | None:
    """Return a handle of the process that listens on the socket, None where that can't be known."""
    try:
        with connect(path, _KILL_SECONDS) as link:
            credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return os.pidfd_open(pid) if pid > 0 else None  # 0 is a process of another namespace
    except OSError:
        return None
