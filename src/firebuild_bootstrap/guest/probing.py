"""Commands that are executed beside the one a machine is there for, to see how it is: as `docker exec` would.

Process 1 of the command (enter.py) forks them, because it has the command's namespaces and its root. It is
asked over a socket that it sends when the command has started: four bytes with the length of a JSON array,
the command, and with them the descriptor for its output; a length of 0 kills the one at work. It answers with
one byte, the exit status. There is one at a time.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from firebuild_bootstrap import wire
from firebuild_bootstrap.polling import readable

from .enter import exit_status
from .errors import ProtocolError
from .kernel import receive_descriptors

_LENGTH = struct.Struct("!I")
_PIECE = 64 * 1024


class Probes:
    """vminit's side.

    Args:
        channel: to process 1 of the command; it is closed here.
        selector: is told of the channel, as `probes`, and of the pipe with a probe's output, as `probe`.
        tell: takes exit status and output of one that has ended; may wait.
    """

    def __init__(
        self,
        channel: socket.socket,
        selector: selectors.BaseSelector,
        tell: Callable[[int, bytes], None],
    ) -> None:
        self._channel = channel
        self._selector = selector
        self._tell = tell
        self.open = True
        """Whether process 1 is still there; it may be when all that wrote to its output have gone."""
        self._busy = False
        self._pipe = -1
        self._output = b""
        selector.register(channel, selectors.EVENT_READ, "probes")

    def ask(self, argv: Sequence[str]) -> None:
        """Have a command executed; an empty one kills that at work.

        Raises:
            ProtocolError: there is one already.
        """
        if not argv:
            if self._busy:
                self._send(_LENGTH.pack(0))
            return
        if self._busy:
            raise ProtocolError("the server sent a probe before the last one had ended")
        self._busy, self._output = True, b""
        self._pipe, write = os.pipe()
        os.set_blocking(self._pipe, False)
        self._selector.register(self._pipe, selectors.EVENT_READ, "probe")
        data = json.dumps(list(argv)).encode()
        with suppress(OSError):  # it has gone; the end of the channel tells
            socket.send_fds(self._channel, [_LENGTH.pack(len(data))], [write])
        os.close(write)
        self._send(data)

    def _send(self, data: bytes) -> None:
        with suppress(OSError):
            self._channel.sendall(data)

    def ready(self, name: str) -> None:
        """Take what has come, on the channel or the pipe.

        Args:
            name: which of them the selector has found readable.
        """
        if name == "probe":
            self._read()  # unless it was found together with the status, which has been taken meanwhile
            return
        try:
            status = self._channel.recv(1)
        except OSError:
            status = b""
        if not status:
            self.open = False
            self._selector.unregister(self._channel)
        elif self._busy:
            self._read()
            self._close_pipe()  # what it has left running may go on writing
            self._busy = False
            self._tell(status[0], self._output)

    def _read(self) -> None:
        """Take what a probe has written; what is too much is dropped."""
        if self._pipe < 0:
            return
        try:
            data = os.read(self._pipe, _PIECE)
        except BlockingIOError:
            return
        self._output += data[: wire.PROBE_BYTES - len(self._output)]
        if not data:
            self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            with suppress(KeyError, ValueError, RuntimeError):  # as a whole, it is closed before
                self._selector.unregister(self._pipe)
            os.close(self._pipe)
            self._pipe = -1

    def close(self) -> None:
        """Take nothing any more."""
        self._close_pipe()
        self._channel.close()


def serve(channel: socket.socket, command: int, execute: Callable[[tuple[str, ...]], NoReturn]) -> int:
    """Be process 1: reap, and execute what vminit asks for, until the command has ended.

    Args:
        channel: to vminit.
        command: the process whose end is awaited.
        execute: executes a probe, in a process of its own, whose output is in place.

    Returns:
        the command's status, as wait(2) has it.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    # The end of a child has to end `poll`, which Python begins again after a signal (PEP 475).
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):  # or the next to be received would have their numbers
        os.dup2(null, descriptor)
    os.close(null)
    server = _Server(channel, command, execute)
    while (result := server.reap()) is None:
        ready = readable(woken, *server.descriptors)
        if woken in ready:
            os.read(woken, _PIECE)
        if channel.fileno() in ready:
            server.take()
    return result


class _Server:
    def __init__(
        self, channel: socket.socket, command: int, execute: Callable[[tuple[str, ...]], NoReturn]
    ) -> None:
        self.descriptors = [channel.fileno()]
        self._channel = channel
        self._command = command
        self._execute = execute
        self._probe = 0

    def reap(self) -> int | None:
        """Reap what has ended; return the status of the command once it is among it."""
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            pid, result = ended
            if pid == self._command:
                return result
            if pid == self._probe:
                self._probe = 0
                with suppress(OSError):
                    self._channel.send(bytes([exit_status(result)]))
        return None

    def take(self) -> None:
        """Do what vminit asks for."""
        length, output = _request(self._channel)
        if length is None:
            self.descriptors.clear()  # vminit has gone, and this process goes with it
        elif length and output >= 0:
            self._probe = _start(json.loads(_exactly(self._channel, length)), output, self._execute)
        elif self._probe:
            with suppress(ProcessLookupError):  # it has no session of its own yet
                os.killpg(self._probe, signal.SIGKILL)
            os.kill(self._probe, signal.SIGKILL)


def _request(channel: socket.socket) -> tuple[int | None, int]:
    head, descriptors = receive_descriptors(channel, _LENGTH.size, 1)
    if not head:
        return None, -1
    head += _exactly(channel, _LENGTH.size - len(head))
    return _LENGTH.unpack(head)[0], descriptors[0] if descriptors else -1


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := channel.recv(size - len(data))):
        data += piece
    return data


def _start(argv: list[str], output: int, execute: Callable[[tuple[str, ...]], NoReturn]) -> int:
    child = os.fork()
    if child == 0:
        os.dup2(output, 1)
        os.dup2(output, 2)
        execute(tuple(argv))
    os.close(output)
    return child
