"""The host's side of a command that a user is attached to: input, signals, the size of its terminal."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from firebuild_bootstrap import messages
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.service.identity import IdentityChannel
from firebuild_bootstrap.service.reporting import check_status
from firebuild_bootstrap.wire import INPUT_BYTES, PROBE_BYTES, Attach
from firebuild_pki.display import counted


class Console:
    """What a user says to a command, from any thread, to the thread that sends it.

    Args:
        started: called, by a thread of the server, when the command is about to be sent.
        begun: called, by a thread of the server, when the guest has executed it.
        output: takes what the command writes, instead of the events of the session.
        probed: see the attribute.
    """

    def __init__(
        self,
        started: Callable[[], None] = lambda: None,
        begun: Callable[[], None] = lambda: None,
        *,
        output: Callable[[bytes], None] | None = None,
        probed: Callable[[int, bytes], None] | None = None,
    ) -> None:
        self._started = started
        self._begun: Callable[[], None] | None = begun
        self.output = output
        self.probed = probed
        """Is told exit status and output of probes, by a thread of the server; must not wait."""
        self._probing = False
        self._changed = threading.Condition()
        self._messages: deque[pb.ToGuest] = deque()
        self._room = INPUT_BYTES
        self._over = False
        self._notify: Callable[[], None] = lambda: None
        self.command: tuple[str, ...] = ()
        """What is executed, once that is known."""
        self.stop_signal = int(signal.SIGTERM)
        """What the image wants to be asked to end with."""
        self.identity = IdentityChannel(self._put)
        self.exit_code: int | None = None
        """The exit status of the command, once it has ended."""

    def write(self, data: bytes) -> bool:
        """Send input and wait until there is room for all of it; False when nobody takes it any more."""
        while data:
            with self._changed:
                self._changed.wait_for(lambda: self._room or self._over)
                if self._over:
                    return False
                piece, data = data[: self._room], data[self._room :]
                self._room -= len(piece)
            self._put(pb.ToGuest(input=pb.Input(data=piece)))
        return True

    def end_input(self) -> None:
        """Say that there is no more input."""
        self._put(pb.ToGuest(input=pb.Input(last=True)))

    def signal(self, number: int) -> None:
        """Send the command a signal."""
        self._put(pb.ToGuest(signal=pb.Signal(number=number)))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the new size of the terminal."""
        self._put(pb.ToGuest(window=messages.window(rows, columns)))

    def probe(self, argv: Sequence[str]) -> None:
        """Have a command executed beside the command; an empty one kills that at work. One at a time."""
        self._probing = self._probing or bool(argv)
        self._put(pb.ToGuest(probe=pb.Probe(argv=argv)))

    def _put(self, message: pb.ToGuest) -> None:
        with self._changed:
            if not self._over:
                self._messages.append(message)
        self._notify()

    # --- for the session ------------------------------------------------------------------------

    def begin(self, notify: Callable[[], None]) -> None:
        """Take what is called when there is something to send; the command is sent next."""
        self._notify = notify
        self._started()

    @property
    def has_messages(self) -> bool:
        """Whether `messages` yields something."""
        return bool(self._messages)

    def messages(self) -> Iterator[bytes]:
        """Yield what is to be sent."""
        while True:
            with self._changed:
                if not self._messages:
                    return
                message = self._messages.popleft()
            yield message.SerializeToString()

    def said(self, message: pb.FromGuest) -> None:
        """Take what the guest says about the command.

        Raises:
            InputError: it can't be.
        """
        if message.HasField("input_taken"):
            self.taken(message.input_taken.bytes)
        elif message.HasField("begun"):
            self.executed()
        elif message.HasField("probed"):
            self.probe_ended(message.probed)
        else:
            self.identity.said(message.identity)

    def executed(self) -> None:
        """Take note that the command runs.

        Raises:
            InputError: the guest has said so before.
        """
        if self._begun is None:
            raise InputError("the guest says a second time that its command has begun")
        begun, self._begun = self._begun, None
        self.identity.begun = True
        begun()

    def taken(self, count: int) -> None:
        """Take note that the command has taken input.

        Raises:
            InputError: there was not as much.
        """
        with self._changed:
            if not 0 < count <= INPUT_BYTES - self._room:
                raise InputError(
                    f"the guest says that its command has taken {counted(count, 'byte')} of input"
                )
            self._room += count
            self._changed.notify_all()

    def probe_ended(self, probed: pb.Probed) -> None:
        """Take note of the end of a probe.

        Raises:
            InputError: there was none, or none ends so.
        """
        if not self._probing or self.probed is None:
            raise InputError("the guest says that a probe has ended, and there was none")
        if not 0 <= probed.exit_code <= 255 or len(probed.output) > PROBE_BYTES:
            raise InputError(
                f"the guest says that a probe ended with status {probed.exit_code} "
                f"and {counted(len(probed.output), 'byte')} of output"
            )
        self._probing = False
        self.probed(probed.exit_code, probed.output)

    def ended(self, step: int, exit_code: int) -> None:
        """Take note of the command's exit status.

        Raises:
            InputError: no command ends so.
        """
        check_status(step, exit_code)
        self.exit_code = exit_code
        self.close()

    def close(self) -> None:
        """Send nothing any more."""
        with self._changed:
            self._over = True
            self._messages.clear()
            self._changed.notify_all()


class FailureShell(Protocol):
    """Has the terminal on which a user gets a shell where a RUN has failed."""

    @property
    def seconds(self) -> float:
        """How long shells have been open, this one included; no time limit of a build counts that."""
        ...

    def opened(self, why: str, check: Callable[[], object]) -> AbstractContextManager[tuple[Console, Attach]]:
        """Have the terminal for a shell until the block ends; wait until nobody else has it.

        Args:
            why: what has failed.
            check: called again and again while it waits; may raise.
        """
        ...

    def await_end(self, check: Callable[[], object]) -> None:
        """Wait until nobody has a shell."""
        ...
