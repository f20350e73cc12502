"""The session with a host of our own version: one stream, on which it says what is to be done next.

Neither side queues without bound: gRPC takes a message from here when the one before has left, and the
next one of the host when the one before was taken.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import grpc

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .client import Client, failure
from .errors import GuestError, ProtocolError, ServerLost, StepError
from .handshake import NotNow
from .stop import Stop

if TYPE_CHECKING:
    from firebuild_bootstrap.layers.tar import Sink

    from .agents import Reply
    from .attached import Control
    from .copy import Incoming
    from .identity import Channel

Stream = Literal["stdout", "stderr"]
BATCH_BYTES = 64 * 1024
"""Of output: what is read and passed on at once."""
_BATCH_SECONDS = 0.05
_WAITING = 16  # messages to the host; the largest have 1 MiB
_AHEAD = 2  # messages of the host
_SHORTEST_INTERVAL = 0.05
_FAREWELL_SECONDS = 10.0
_LAST_MOMENT = 1.0


class NoSession(Exception):
    """The server is older, and knows no sessions."""


class Checkpoint(NamedTuple):
    """Asks for the layer of a step that is done.

    Args:
        step: its number.
        send: to be called with what writes the layer as an archive; it waits while the host is slow.
    """

    step: int
    send: Callable[[Callable[[Sink], object]], None]


class _Output(NamedTuple):
    stderr: bool
    data: bytes


class _LayerPieces:
    """Where a layer is written to."""

    def __init__(self, put: Callable[[pb.FromGuest], None]) -> None:
        self._put = put

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        """Send what there is, at most 1 MiB."""
        self._put(pb.FromGuest(layer=pb.Layer(data=bytes(data))))


_Incoming = pb.ToGuest | memoryview
_STEPS = ("run", "apply", "workdir", "checkpoint", "finish")
_TO_THE_COMMAND = ("input", "signal", "window", "identity", "probe")
_END = pb.FromGuest()
_ALIVE = pb.FromGuest(alive=pb.Alive())


def join(client: Client, stop: Stop, interval: float) -> Session:
    """Begin the session.

    Args:
        client: the way to the host.
        stop: is set when the host is lost; its reason ends every wait.
        interval: seconds after which a sign of life is due, in either direction.

    Raises:
        NoSession: see there.
        ServerLost: the host stayed out of reach, or refused this guest.
    """
    interval = max(interval, _SHORTEST_INTERVAL)

    def first(channel: grpc.Channel) -> Session:
        try:
            return Session(channel, stop, interval, client.connect_timeout, client.call_timeout)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NoSession from error
            raise

    return client.connect(first, silence=interval)


class Session:
    """The host at the other end of a stream; leaving the block ends it.

    Args:
        channel: to the host.
        stop: see `join`.
        interval: see `join`.
        first_timeout: seconds that the host may take to say what is to be done first.
        timeout: seconds that it may take to say something later, where it is due, or to take something.

    Raises:
        grpc.RpcError: the call has failed.
        NotNow: it was not answered.
    """

    def __init__(
        self, channel: grpc.Channel, stop: Stop, interval: float, first_timeout: float, timeout: float
    ) -> None:
        self._stop = stop
        self._interval = interval
        self._timeout = timeout
        self._seconds = 0.0
        self._leaving = False
        self._over = threading.Event()
        self._error: grpc.RpcError | None = None
        self._outgoing: queue.Queue[pb.FromGuest | _Output] = queue.Queue(_WAITING)
        self._incoming: queue.Queue[_Incoming | None] = queue.Queue(_AHEAD)
        method: Any = channel.stream_stream(wire.method("Session"))
        self._asked = itertools.count(1)
        self._asking: dict[int, Reply] = {}
        self._at_work = False
        self._control: Control | None = None
        self._identity: Channel | None = None
        self._call = method(self._messages())
        self._reader = threading.Thread(target=self._read, name="session", daemon=True)
        self._reader.start()
        from . import executor  # noqa: F401 - while the host answers: it takes longer than that

        with ExitStack() as begun:
            begun.callback(self._end)
            begun.enter_context(stop.calling(self._wake))
            self._first: _Incoming | None = self._begin(first_timeout)
            self._closing = begun.pop_all()

    def _begin(self, timeout: float) -> _Incoming:
        try:
            message = self._incoming.get(timeout=timeout)
            if message is None and not self._over.is_set():  # asked to end: who is there is told why
                message = self._incoming.get(timeout=_LAST_MOMENT)
        except queue.Empty:
            self._stop.check()
            raise NotNow(f"the server did not begin the session within {timeout:g} s") from None
        if message is not None:
            return message  # whatever else has happened: now the host can be told
        self._stop.check()
        if self._error is not None:
            raise self._error
        raise NotNow("the server ended the session at once")

    def __enter__(self) -> Session:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the call, whatever has become of it."""
        self._closing.close()

    def _end(self) -> None:
        self._leaving = True
        self._call.cancel()
        with suppress(queue.Full):
            self._outgoing.put_nowait(_END)  # frees the thread that sends
        while self._reader.is_alive():
            with suppress(queue.Empty):
                self._incoming.get(timeout=0.05)
        self._close_control()

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()

    # --- what the host wants ----------------------------------------------------------------------

    def steps(self) -> Iterator[wire.AnyCommand | Checkpoint]:
        """Yield what is to be done, until nothing is left.

        Raises:
            ProtocolError: the host sent something else.
            ServerLost: it has gone, or is silent.
        """
        while True:
            message, self._first = self._first or self._next(), None
            what = "files" if isinstance(message, memoryview) else message.WhichOneof("message")
            if isinstance(message, memoryview) or what not in _STEPS:
                raise ProtocolError(f"the server sent {what or 'nothing'} where a step was due")
            if what == "finish":
                return
            try:
                yield messages.decode(message) or Checkpoint(message.checkpoint.step, self._send_layer)
            except wire.WireError as error:
                raise ProtocolError(f"the server sent a step that can't be read: {error}") from error

    def files(self, resource: str) -> Iterator[Incoming]:
        """Yield the files of the COPY that was yielded last, or those of a mount, by the resource's name."""
        from .copy import packed

        if resource:
            self._put(pb.FromGuest(want=pb.Want(resource=resource)))
        return packed(self._files())

    def _files(self) -> Iterator[pb.Group | memoryview]:
        while True:
            message = self._next()
            if isinstance(message, memoryview):
                yield message
                continue
            match what := message.WhichOneof("message"):
                case "group":
                    yield message.group
                case "files_end":
                    return
                case _:
                    raise ProtocolError(f"the server sent {what or 'nothing'} in the middle of files")

    def _next(self, *, forever: bool = False) -> _Incoming:
        self._stop.check()
        try:
            message = self._incoming.get(timeout=None if forever else self._timeout)
        except queue.Empty:
            raise ServerLost(f"the server sent nothing for {self._timeout:g} s") from None
        self._stop.check()
        if message is None:
            raise self._lost()
        return message

    def _lost(self) -> ServerLost:
        why = "it said nothing about it" if self._error is None else failure(self._error)
        return ServerLost(f"the server ended the session: {why}")

    def _wake(self) -> None:
        with suppress(queue.Full):  # then nobody waits
            self._incoming.put_nowait(None)

    def _read(self) -> None:
        """Read what comes, in a thread of its own: so the end of the stream ends a RUN, too."""
        begun = False
        try:
            for data in self._call:
                begun = True
                try:
                    self._take(messages.decode_to_guest(data))
                except wire.WireError as error:
                    self._stop.set(ProtocolError(f"the server sent what can't be read: {error}"))
                except ProtocolError as error:
                    self._stop.set(error)
        except grpc.RpcError as error:
            self._error = error
        except Exception as error:  # whatever it is: nobody else would see that nothing is read any more
            self._stop.set(ProtocolError(f"the session can't be read any more: {error!r}"))
        self._over.set()
        if begun and not self._leaving:
            self._stop.set(self._lost())
        self._incoming.put(None)

    def _take(self, message: _Incoming) -> None:
        what = "piece" if isinstance(message, memoryview) else message.WhichOneof("message")
        if what in _STEPS:
            # Or what came ahead would be worked through after the end of the stream, which is behind it.
            if self._at_work:
                raise ProtocolError(f"the server sent {what} before the last step was done")
            self._at_work = True
        if isinstance(message, memoryview) or what not in ("agent_reply", *_TO_THE_COMMAND):
            if not isinstance(message, memoryview) and message.run.HasField("attach"):
                from .attached import Control

                self._close_control()  # of a command that has ended
                self._control = Control(self._taken, self._begun, self._probed)
                if message.run.attach.HasField("identity"):
                    from .identity import Channel

                    self._identity = Channel(self._say_of_identity)
            self._incoming.put(message)
        elif what in _TO_THE_COMMAND:
            self._tell(message, self.control())
        elif (reply := self._asking.pop(message.agent_reply.number, None)) is not None:
            reply(message.agent_reply.message)

    def _tell(self, message: pb.ToGuest, control: Control) -> None:
        match message.WhichOneof("message"):
            case "input":
                control.put_input(message.input.data, last=message.input.last)
            case "signal":
                control.put_signal(message.signal.number)
            case "identity":
                from .identity import Said

                one = message.identity
                self.identity().put(Said(one.number, one.chain, one.trust))
            case "probe":
                control.put_probe(message.probe.argv)
            case _:
                control.put_window(messages.window_size(message.window))

    def control(self) -> Control:
        """Return what the host says to the command with `attach`."""
        if self._control is None:
            raise ProtocolError("the server sent something to a command, and none is attached")
        return self._control

    def identity(self) -> Channel:
        """Return what the host says about the identity of that command's machine."""
        if self._identity is None:
            raise ProtocolError("the server renews an identity, and the machine has none")
        return self._identity

    # --- what the host is told --------------------------------------------------------------------

    def instead(self, error: StepError, seconds: float, /) -> wire.RunCommand:
        """Tell of a RUN that has failed, and return what the host sends in its place, whenever that is."""
        self._at_work = False
        self._put(pb.FromGuest(failing=self._failed(error, pb.Done(duration_ms=round(seconds * 1000)))))
        # The host may take its time: a user has the shell of another stage before this one.
        message = self._next(forever=True)
        try:
            command = None if isinstance(message, memoryview) else messages.decode(message)
        except wire.WireError as wrong:
            raise ProtocolError(f"the server sent a command that can't be read: {wrong}") from wrong
        if not isinstance(command, wire.RunCommand) or command.attach is None:
            raise ProtocolError(
                "expected a command in place of the failed one, the server sent something else"
            )
        return command

    def started(self, _step: int, /) -> None:
        """Say nothing: the host knows what it has sent."""

    def write(self, _step: int, stream: Stream, data: bytes, /) -> None:
        """Pass on output of the step at work; waits while the host is slow."""
        self._put(_Output(stream == "stderr", data))

    def ask_agent(self, identifier: str, request: bytes, reply: Reply, /) -> None:
        """Ask one of the user's SSH agents; `reply` is called by the thread that reads, and must not wait."""
        number = next(self._asked)
        self._asking[number] = reply
        message = pb.AgentRequest(number=number, id=identifier, message=request)
        self._put(pb.FromGuest(agent_request=message))

    def _taken(self, count: int) -> None:
        self._put(pb.FromGuest(input_taken=pb.InputTaken(bytes=count)))

    def _begun(self) -> None:
        self._put(pb.FromGuest(begun=pb.Begun()))

    def _say_of_identity(self, number: int, *, csr: bytes = b"", error: str = "") -> None:
        state = pb.IdentityState(number=number, csr=csr, error=error.encode("utf-8", "replace").decode())
        self._put(pb.FromGuest(identity=state))

    def finished(self, step: int, exit_code: int, seconds: float) -> None:
        """Say that a step is done; why one has failed is for `abort`."""
        self._seconds = seconds
        self._asking.clear()  # nobody is there any more
        if not exit_code:
            self._at_work = False
            self._put(pb.FromGuest(done=self._done(step)))

    def _probed(self, status: int, output: bytes) -> None:
        self._put(pb.FromGuest(probed=pb.Probed(exit_code=status, output=output)))

    def _send_layer(self, write_to: Callable[[Sink], object]) -> None:
        write_to(_LayerPieces(self._put))
        self._at_work = False
        self._put(pb.FromGuest(layer=pb.Layer(last=True)))

    def success(self) -> None:
        """Say that all is done.

        Raises:
            ServerLost: the host does not take it.
        """
        if not self._farewell(self._done(0)):
            why = "nothing came back" if self._error is None else failure(self._error)
            raise ServerLost(f"the server did not take the success: {why}")

    def abort(self, error: GuestError) -> bool:
        """Say why no more can be done; False when the host did not take it. Never raises."""
        return self._farewell(self._failed(error, self._done(error.step)))

    def _failed(self, error: GuestError, done: pb.Done) -> pb.Done:
        done.failure.error = error.message.encode("utf-8", "replace").decode()  # names need not be UTF-8
        done.failure.exit_code = error.exit_code
        done.failure.reason = error.reason
        return done

    def _done(self, step: int) -> pb.Done:
        seconds, self._seconds = self._seconds, 0.0
        status = self._control.status if step and self._control is not None else 0
        return pb.Done(step=step, duration_ms=round(seconds * 1000), exit_code=status)

    def _farewell(self, done: pb.Done) -> bool:
        """Say a last word, and wait until the host has ended the stream; what it still sends is dropped."""
        self._leaving = True
        limit = min(_FAREWELL_SECONDS, self._timeout)
        until = time.monotonic() + limit
        if self._over.is_set():
            return False
        try:
            self._outgoing.put(pb.FromGuest(done=done), timeout=limit)
            while self._incoming.get(timeout=max(until - time.monotonic(), 0.0)) or not self._over.is_set():
                pass
        except (queue.Full, queue.Empty):
            return False
        return self._error is None

    def _put(self, message: pb.FromGuest | _Output) -> None:
        until = time.monotonic() + self._timeout
        while True:
            self._stop.check()
            try:
                return self._outgoing.put(message, timeout=0.1)
            except queue.Full:
                if time.monotonic() > until:
                    limit = f"{self._timeout:g} s"
                    raise ServerLost(f"the server did not take the output within {limit}") from None

    def _messages(self) -> Iterator[bytes]:
        """Yield what is sent; gRPC asks for more, in a thread of its own, when the last has left."""
        yield pb.FromGuest(hello=pb.Hello(version=messages.VERSION)).SerializeToString()
        held: pb.FromGuest | _Output | None = None
        while True:
            try:
                message = held or self._outgoing.get(timeout=self._interval)
            except queue.Empty:
                message = _ALIVE
            held = None
            if message is _END:
                return
            if isinstance(message, _Output):
                message, held = self._batch(message)
            yield message.SerializeToString()

    def _batch(self, first: _Output) -> tuple[pb.FromGuest, pb.FromGuest | _Output | None]:
        """Merge what is written to one stream within a moment; return it, and what came after it."""
        parts, size, held = [first.data], len(first.data), None
        until = time.monotonic() + _BATCH_SECONDS
        while size < BATCH_BYTES and held is None:
            try:
                message = self._outgoing.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                break
            if not isinstance(message, _Output) or message.stderr != first.stderr:
                held = message
            else:
                parts.append(message.data)
                size += len(message.data)
        return pb.FromGuest(output=pb.Output(stderr=first.stderr, data=b"".join(parts))), held
