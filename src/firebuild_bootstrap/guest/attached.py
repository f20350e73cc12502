"""The command that a machine is there for: its input, its signals and its terminal (docs/run.md).

The thread that reads the session hands over what the host says, and never waits; the thread that relays
the command's output acts on it. The command's process is signalled through a descriptor that its process 1
has sent (enter.py), because here nobody knows its number.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from firebuild_bootstrap import wire

from .enter import STARTED
from .errors import ProtocolError
from .kernel import receive_descriptors
from .probing import Probes
from .stop import Stop, Waker

Stream = Literal["stdout", "stderr"]

BATCH_BYTES = 64 * 1024
_WINDOW = struct.Struct("HHHH")
_END_OF_INPUT = b"\x04"  # VEOF, as termios(3) has it
_LAST_SIGNAL = 64


class Control:
    """What the host says to the command, from its threads to that of the command.

    Args:
        taken: told how many bytes of input the command has taken; may wait.
        begun: called when the command is executed; may wait.
        probed: told exit status and output of probes; may wait.
    """

    def __init__(
        self,
        taken: Callable[[int], None],
        begun: Callable[[], None] = lambda: None,
        probed: Callable[[int, bytes], None] = lambda _status, _output: None,
    ) -> None:
        self.taken = taken
        self.begun = begun
        self.probed = probed
        self._probes: list[Sequence[str]] = []
        self.status = 0
        """The command's exit status, once it has ended."""
        self._lock = threading.Lock()
        self._waker = Waker()
        self._input = bytearray()
        self._waiting = 0
        self._ended = False
        self._signals: list[int] = []
        self._size: tuple[int, int] | None = None

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the host has said something."""
        return self._waker.fileno()

    def put_input(self, data: bytes, *, last: bool) -> None:
        """Take the next bytes of standard input.

        Raises:
            ProtocolError: there are more than may wait.
        """
        with self._lock:
            self._waiting += len(data)
            if self._waiting > wire.INPUT_BYTES:
                raise ProtocolError(f"the server sent more than {wire.INPUT_BYTES} bytes of input at once")
            self._input += data
            self._ended = self._ended or last
        self._waker.wake()

    def put_signal(self, number: int) -> None:
        """Take a signal for the command.

        Raises:
            ProtocolError: there is none of that number.
        """
        if not 0 < number <= _LAST_SIGNAL:
            raise ProtocolError(f"the server sent the signal {number}")
        with self._lock:
            if number not in self._signals:  # as the kernel has it: one that waits is not there twice
                self._signals.append(number)
        self._waker.wake()

    def put_window(self, size: tuple[int, int]) -> None:
        """Take the size of the terminal, rows and columns."""
        with self._lock:
            self._size = size
        self._waker.wake()

    def put_probe(self, argv: Sequence[str]) -> None:
        """Take a command to be executed beside the command; an empty one kills it.

        Raises:
            ProtocolError: more of them wait than one and its end.
        """
        with self._lock:
            if len(self._probes) > 1:
                raise ProtocolError("the server sent a probe before the last one had ended")
            self._probes.append(argv)
        self._waker.wake()

    def drain_probes(self) -> list[Sequence[str]]:
        """Return what has come of these."""
        with self._lock:
            probes, self._probes = self._probes, []
            return probes

    def drain(self) -> tuple[bytes, bool, list[int], tuple[int, int] | None]:
        """Return what has come: input, whether that is all of it, signals, and the last size."""
        self._waker.drain()
        with self._lock:
            data, self._input = bytes(self._input), bytearray()
            signals, self._signals = self._signals, []
            size, self._size = self._size, None
            return data, self._ended, signals, size

    def took(self, count: int) -> None:
        """Make room for as much input, and have the host told."""
        with self._lock:
            self._waiting -= count
        self.taken(count)

    def close(self) -> None:
        """Release the descriptors. Idempotent; the host may go on talking."""
        self._waker.close()


class Attachment:
    """Relays between the host and a command that is started.

    Args:
        control: what the host says.
        attach: how the command is attached.
        stdin: the pipe to the command's standard input; it is closed here. It is of no use for a terminal.
        status: what descriptors, and the report of a failure, come from.
        outputs: the pipes from the command, by the names of their streams.
        output: takes what it writes; may wait.
        stop: ends it.
    """

    def __init__(
        self,
        control: Control,
        attach: wire.Attach,
        *,
        stdin: int,
        status: socket.socket,
        outputs: Mapping[Stream, int],
        output: Callable[[Stream, bytes], None],
        stop: Stop,
    ) -> None:
        self._control = control
        self._attach = attach
        self._stdin = stdin
        self._status = status
        self._outputs = outputs
        self._output = output
        self._stop = stop
        self._process = -1
        self._terminal = -1
        self._signals: list[int] = []
        self._pending = bytearray()
        self._no_more = False
        self._size = (attach.rows, attach.columns)
        self._report = b""
        self._selector = selectors.DefaultSelector()
        self._probes: Probes | None = None

    def relay(self) -> bytes:
        """Relay until the command and all that it has started have ended; return the begin of a report.

        Raises:
            GuestError: the reason of `stop`, or the host is lost.
        """
        os.set_blocking(self._stdin, False)
        if self._attach.terminal or not self._attach.input:
            self._close_input()
        try:
            with self._selector:
                for stream, pipe in self._outputs.items():
                    self._selector.register(pipe, selectors.EVENT_READ, stream)
                for source, name in ((self._stop, "stop"), (self._control, "said"), (self._status, "status")):
                    self._selector.register(source, selectors.EVENT_READ, name)
                left = set[str](self._outputs)
                while left or (self._probes is not None and self._probes.open):
                    for key, events in self._selector.select():
                        self._stop.check()
                        self._ready(key, events, left)
                while self._terminal >= 0:  # what its kernel still holds
                    self._read_terminal()
        finally:
            self._close()
        return self._report

    def _ready(self, key: selectors.SelectorKey, events: int, left: set[str]) -> None:
        match key.data:
            case "said":
                self._said()
            case "status":
                self._started()
            case "probes" | "probe" if self._probes is not None:
                self._probes.ready(key.data)
            case "input":
                self._write(self._stdin)
            case "terminal":
                if events & selectors.EVENT_WRITE:
                    self._write(self._terminal)
                if events & selectors.EVENT_READ:
                    self._read_terminal()
            case name:
                if data := os.read(key.fd, BATCH_BYTES):
                    self._output(name, data)
                else:
                    self._selector.unregister(key.fileobj)
                    left.discard(name)

    def _started(self) -> None:
        """Take the descriptors of the command, or the begin of why there is none; and that it is executed.

        Then the kernel has closed the last descriptor that could report otherwise.
        """
        word, descriptors = receive_descriptors(self._status, 1, 3)
        if word != STARTED:
            self._selector.unregister(self._status)
            self._report = word
            if not word and self._process >= 0:
                self._control.begun()
            return
        self._process, *terminal = descriptors
        if self._attach.probed:
            channel = socket.socket(fileno=terminal.pop(0))
            self._probes = Probes(channel, self._selector, self._control.probed)
        if terminal:
            (self._terminal,) = terminal
            os.set_blocking(self._terminal, False)
            self._selector.register(self._terminal, selectors.EVENT_READ, "terminal")
            self._resize()
        self._send_signals()
        self._feed()
        self._ask()

    def _ask(self) -> None:
        if self._probes is not None:
            for argv in self._control.drain_probes():
                self._probes.ask(argv)

    def _said(self) -> None:
        data, ended, signals, size = self._control.drain()
        if size is not None:
            self._size = size
            self._resize()
        self._signals += signals
        self._send_signals()
        self._pending += data
        if ended and not self._no_more:
            self._no_more = True
            if self._attach.terminal:
                self._pending += _END_OF_INPUT
        self._feed()
        self._ask()

    def _send_signals(self) -> None:
        while self._process >= 0 and self._signals:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, self._signals.pop(0))

    def _resize(self) -> None:
        if self._terminal >= 0 and any(self._size):
            import fcntl
            import termios

            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, _WINDOW.pack(*self._size, 0, 0))

    def _feed(self) -> None:
        """Watch for room where there is input, and end the input where there is no more."""
        if self._terminal >= 0:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._pending else 0)
            self._selector.modify(self._terminal, events, "terminal")
        elif self._attach.terminal:
            return  # it is not there yet
        elif self._stdin < 0:
            self._drop()
        elif self._pending:
            if self._stdin not in self._selector.get_map():
                self._selector.register(self._stdin, selectors.EVENT_WRITE, "input")
        elif self._no_more:
            self._close_input()

    def _write(self, descriptor: int) -> None:
        try:
            count = os.write(descriptor, self._pending[:BATCH_BYTES])
        except BlockingIOError:
            return
        except OSError:  # the command reads no more
            self._close_input()
            self._drop()
            return
        del self._pending[:count]
        self._took(count)
        if not self._pending:
            if descriptor == self._stdin and descriptor in self._selector.get_map():
                self._selector.unregister(descriptor)
            self._feed()

    def _drop(self) -> None:
        count = len(self._pending)
        self._pending.clear()
        self._took(count)

    def _took(self, count: int) -> None:
        if count and not (self._attach.terminal and self._no_more):  # the last is ours
            self._control.took(count)

    def _read_terminal(self) -> None:
        try:
            data = os.read(self._terminal, BATCH_BYTES)
        except BlockingIOError:
            data = b""
        except OSError as error:
            if error.errno != errno.EIO:  # nobody has it open any more, pty(7)
                raise
            data = b""
        if data:
            self._output("stdout", data)
            return
        self._selector.unregister(self._terminal)
        os.close(self._terminal)
        self._terminal = -1
        self._drop()

    def _close_input(self) -> None:
        if self._stdin >= 0:
            with suppress(KeyError, ValueError, RuntimeError):
                self._selector.unregister(self._stdin)
            os.close(self._stdin)
            self._stdin = -1

    def _close(self) -> None:
        self._close_input()
        if self._probes is not None:
            self._probes.close()
        for descriptor in (self._process, self._terminal):
            if descriptor >= 0:
                os.close(descriptor)
        self._terminal = self._process = -1
