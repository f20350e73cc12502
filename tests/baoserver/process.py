"""The server process: its port, its log, its end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_BAO = Path(sys.executable).parent / "bao"

# Below the ports that the kernel hands out, so that nothing takes a server's port while it is down.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a port that nobody listens on, and the one above it is free as well.

    Another process may still take it before the server does; who starts a server tries again then.
    """
    while True:
        port = random.choice(_PORTS)
        if all(map(_is_free, (port, port + 1))):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Process:
    """One run of ``bao server``. It dies with the thread that started it, even by ``kill -9``.

    Args:
        arguments: what follows ``bao server``.
        home: its HOME, where a dev server writes its root token.
        log: file that its output is appended to.
    """

    def __init__(self, arguments: Sequence[str], home: Path, log: Path) -> None:
        self._log = log
        self._suspended = False
        self._log_start = log.stat().st_size if log.exists() else 0
        environ = {"HOME": str(home), "PATH": os.environ.get("PATH", os.defpath)}
        command = ["setpriv", "--pdeathsig", "KILL", str(_BAO), "server", *arguments]
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, cwd=home
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._popen.poll() is None

    @property
    def log(self) -> str:
        """What this run has written so far."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def lost_its_port(self) -> bool:
        """Whether it ended because another process had the port."""
        return not self.is_alive and "address already in use" in self.log

    def stop(self) -> None:
        """End it in good order (SIGTERM); after ten seconds by force."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a power cut would."""
        self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Stop it in its tracks: connections are accepted, by the kernel, and nothing answers."""
        if self.is_alive and not self._suspended:
            self._popen.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._popen.pid, os.WSTOPPED)  # all of its threads have stopped
            self._suspended = True

    def resume(self) -> None:
        """Let it go on."""
        self._popen.send_signal(signal.SIGCONT)
        self._suspended = False

    def _end(self, number: signal.Signals) -> None:
        if self.is_alive:
            self._popen.send_signal(number)
            self._popen.send_signal(signal.SIGCONT)
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
            print(f"bao had to be killed:\n{self.log}", file=sys.stderr)
