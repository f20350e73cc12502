"""A program on a terminal of its own, and what a user there types and reads."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Terminal:
    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor
        self._said = ""

    def read(self, until: str = "") -> str:
        """Read up to a text, or without one to the end."""
        while not until or until not in self._said:
            try:
                data = os.read(self._descriptor, 65536)
            except OSError:  # nobody has the other side any more
                data = b""
            if not data:
                assert not until, self._said
                break
            self._said += data.decode()
        before, _, self._said = self._said.partition(until) if until else (self._said, "", "")
        return before + until

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def hang_up(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def keys(self) -> str:
        """What becomes of keys such as Ctrl-C."""
        return "handled" if termios.tcgetattr(self._descriptor)[3] & termios.ISIG else "passed on"

    def status(self) -> int:
        """Return the exit status of the program once it has ended."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def on_terminal(program: Path, *arguments: str | Path, environ: Mapping[str, str]) -> Iterator[Terminal]:
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execve(program, [program.name, *map(str, arguments)], dict(environ))
    terminal = Terminal(pid, descriptor)
    terminal.resize(33, 77)
    try:
        yield terminal
    finally:
        if terminal._descriptor >= 0:
            terminal.hang_up()
