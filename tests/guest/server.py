"""A small bootstrap server over mutual TLS that does what a test tells it, right or wrong."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.legacy.scripts import encode_command
from guest.pki import Pki


@dataclass(frozen=True)
class Item:
    """One entry of what a COPY or a mount sends in a session, and its group."""

    entry: tar.Entry
    content: bytes = b""
    group: pb.Group = field(default_factory=pb.Group)


Message = pb.ResourceChunk | pb.ToGuest | Item
Chunks = Sequence[Message] | Callable[[grpc.ServicerContext], Iterator[Message]]
_GROUP = ("from_directory", "keep_owner", "of_tree")


def _item(name: str, kind: tar.Kind, content: bytes = b"", **fields: Any) -> list[Item]:
    group = pb.Group(**{member: fields.pop(member, False) for member in _GROUP})
    return [Item(tar.Entry(name, kind, **{"mode": 0o644, "size": len(content), **fields}), content, group)]


def a_file(name: str, data: bytes = b"", **fields: Any) -> list[Item]:
    return _item(name, tar.FILE, data, **fields)


def in_tree(name: str, data: bytes = b"", **fields: Any) -> list[Item]:
    return _item(name, tar.FILE, data, from_directory=True, **fields)


def a_directory(name: str, mode: int = 0o755, **fields: Any) -> list[Item]:
    return _item(name, tar.DIRECTORY, mode=mode, from_directory=True, **fields)


def a_link(name: str, text: str, *, hard: bool = False, **fields: Any) -> list[Item]:
    kind: tar.Kind = tar.HARDLINK if hard else tar.SYMLINK
    return _item(name, kind, linkname=text, **{"from_directory": True, **fields})


def head(name: str = "f", **fields: Any) -> pb.ResourceChunk:
    fields = {"targetPath": "/t", "targetWorkdir": "/", "fileMode": 0o644, **fields}
    return pb.ResourceChunk(header=pb.ResourceChunk.ResourceHeader(sourcePath=name, **fields))


def chunk(data: bytes, name: str = "f", checksum: bytes | None = None) -> pb.ResourceChunk:
    digest = wire.checksum(data) if checksum is None else checksum
    return pb.ResourceChunk(chunk=pb.ResourceChunk.ResourceContents(chunk=data, checksum=digest, id=name))


def group(**fields: bool) -> pb.ToGuest:
    return pb.ToGuest(group=pb.Group(**fields))


def piece(data: bytes) -> pb.ToGuest:
    return pb.ToGuest(piece=pb.Piece(data=data))


END = piece(bytes(1024))


def member(name: str, content: bytes = b"", kind: tar.Kind = tar.FILE, **fields: Any) -> bytes:
    """One entry of a packed stream with its content."""
    (item,) = _item(name, kind, content, **fields)
    return _encoded(item)


def _encoded(item: Item) -> bytes:
    head, _ = tar.encode(item.entry, item.entry.stored)
    return head + item.content + bytes(-len(item.content) % tar.BLOCK)


def packed(chunks: Sequence[Message]) -> list[pb.ToGuest]:
    """What a session sends for these: items, or its own messages."""
    found = [message for message in chunks if isinstance(message, pb.ToGuest)]
    items = [message for message in chunks if isinstance(message, Item)]
    for item in items:
        data = _encoded(item)
        found += [pb.ToGuest(group=item.group), piece(data[:700])]
        found += [piece(data[at : at + 1024 * 1024]) for at in range(700, len(data), 1024 * 1024)]
    return [*found, END] if items else found


@dataclass(frozen=True)
class Log:
    """What the guest wrote: in a session bytes of a step, else lines. Or that a step began or ended."""

    stream: str
    step: int = 0
    data: bytes = b""
    lines: Sequence[str] = ()
    event: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Abort:
    """Why the guest has given up; in the calls of old it says no more than the error."""

    error: str
    step: int = 0
    exit_code: int = 0
    reason: str = ""


class BuildServer:
    """Serves commands and resources in a session, or in the calls of old; records what the guest says."""

    def __init__(self, pki: Pki, *, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.old = False
        self.commands: list[wire.AnyCommand | pb.ToGuest | str] = []
        self.layers: list[bytes] = []
        self.wants: list[str] = []
        self.meanwhile: list[pb.ToGuest | None] = []
        """What is sent while a command is at work; None waits until the guest has said something."""
        self.said: list[pb.FromGuest] = []
        self.resources: dict[str, Chunks] = {}
        self.logs: list[Log] = []
        self.aborts: list[Abort] = []
        self.successes = 0
        self.pings: list[str] = []
        self.requests: list[pb.ResourceRequest] = []
        self.calls: list[str] = []
        self.on_log: Callable[[Log], object] = lambda log: None
        self.on_ping: Callable[[grpc.ServicerContext], None] = lambda context: None
        self.on_commands: Callable[[grpc.ServicerContext], None] = lambda context: None
        self.on_success: Callable[[grpc.ServicerContext], None] = lambda context: None
        self._step = 0
        self._log_lock = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        credentials = credentials or grpc.ssl_server_credentials(
            [(pki.server.key, pki.server.cert)], root_certificates=pki.ca, require_client_auth=True
        )
        self.host_port = f"127.0.0.1:{self._server.add_secure_port(f'127.0.0.1:{port}', credentials)}"

    def start(self) -> BuildServer:
        self._server.start()
        return self

    def stop(self) -> None:
        self._server.stop(0).wait()

    # --- what tests ask -----------------------------------------------------------------------

    def written(self, stream: str) -> bytes:
        return b"".join(log.data for log in self.logs if log.stream == stream)

    @property
    def stdout(self) -> bytes:
        return self.written("stdout")

    @property
    def events(self) -> list[tuple[int, str, int]]:
        return [(log.step, log.event, log.exit_code) for log in self.logs if log.event]

    def wait_for(self, condition: Callable[[], object], seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the guest did not do it in time"
            time.sleep(0.01)

    # --- the service --------------------------------------------------------------------------

    def _handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, tuple[Callable[..., Any], Any]] = {
            "Commands": (self._commands, pb.Empty),
            "Ping": (self._ping, pb.PingRequest),
            "StdOut": (lambda request, _: self._lines("stdout", request), pb.LogMessage),
            "StdErr": (lambda request, _: self._lines("stderr", request), pb.LogMessage),
            "Abort": (self._abort, pb.AbortRequest),
            "Success": (self._success, pb.Empty),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._noting(name, function),
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, (function, request) in unary.items()
        }
        handlers["Resource"] = grpc.unary_stream_rpc_method_handler(
            self._noting("Resource", self._resource),
            request_deserializer=pb.ResourceRequest.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        handlers["Session"] = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler(wire.SERVICE, handlers)

    # --- a session ----------------------------------------------------------------------------

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if self.old:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")
        self.calls.append("Session")
        self.on_commands(context)
        said: queue.Queue[pb.FromGuest] = queue.Queue()
        threading.Thread(target=self._hear, args=(requests, said, context), daemon=True).start()
        assert said.get().hello.version == messages.VERSION
        for command in self.commands:
            assert not isinstance(command, str)
            if isinstance(command, pb.ToGuest):
                yield command.SerializeToString()
                if command.HasField("checkpoint"):
                    self.layers.append(b"")
                    while (heard := said.get()).HasField("layer") and not heard.layer.last:
                        self.layers[-1] += heard.layer.data
                    if not self._done(heard.done):
                        return
                    continue
            else:
                self._step = command.step
                self.logs.append(Log("stdout", command.step, event="STARTED"))
                yield messages.encode(command).SerializeToString()
                if isinstance(command, wire.CopyCommand):
                    yield from self._files(command.source, said, context)
            yield from self._next_meanwhile(command)
            while not (message := said.get()).HasField("done"):
                if message.HasField("want"):
                    self.wants.append(message.want.resource)
                    yield from self._files(message.want.resource, said, context)
                elif not message.HasField("begun"):
                    self.said.append(message)
                    yield from self._next_meanwhile(command)
            if not self._done(message.done):
                return
        yield pb.ToGuest(finish=pb.Finish()).SerializeToString()
        if self._done(said.get().done):
            self.on_success(context)
            self.successes += 1

    def _next_meanwhile(self, command: wire.AnyCommand | pb.ToGuest) -> Iterator[bytes]:
        """Send what is due while a command is at work: at first, and for each thing that is said then."""
        while self.meanwhile and not isinstance(command, pb.ToGuest):
            message = self.meanwhile.pop(0)
            if message is None:
                return
            yield message.SerializeToString()

    def _hear(
        self, requests: Iterator[bytes], said: queue.Queue[pb.FromGuest], context: grpc.ServicerContext
    ) -> None:
        try:
            for data in requests:
                message = pb.FromGuest.FromString(data)
                match message.WhichOneof("message"):
                    case "alive":
                        self.pings.append("alive")
                    case "output":
                        stream = "stderr" if message.output.stderr else "stdout"
                        self._log(Log(stream, self._step, message.output.data))
                    case _:
                        said.put(message)
        except grpc.RpcError:
            pass  # the guest has gone
        except RuntimeError:  # of `on_log`
            context.cancel()
        said.put(pb.FromGuest(done=pb.Done(failure=pb.Failure(reason="gone"))))

    def _files(
        self, name: str, said: queue.Queue[pb.FromGuest], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        chunks = self.resources.get(name)
        if chunks is None:
            context.abort(grpc.StatusCode.ABORTED, f"no resource {name}")
        for message in chunks(context) if callable(chunks) else packed(chunks):
            if not said.empty():
                return
            assert isinstance(message, pb.ToGuest)
            yield message.SerializeToString()
        yield pb.ToGuest(files_end=pb.FilesEnd()).SerializeToString()

    def _done(self, done: pb.Done) -> bool:
        failed = done.HasField("failure")
        if done.failure.reason == "gone":
            return False
        why = done.failure
        if done.step:
            code = (why.exit_code or 1) if failed else 0
            self.logs.append(Log("stdout", done.step, event="FINISHED", exit_code=code))
        if failed:
            self.aborts.append(Abort(why.error, done.step, why.exit_code, why.reason))
        return not failed

    # --- the calls of old ---------------------------------------------------------------------

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.append(name)
            return function(request, context)

        return noted

    def _commands(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        self.on_commands(context)
        return pb.CommandsResponse(
            command=[
                command if isinstance(command, str) else encode_command(command)
                for command in self.commands
                if isinstance(command, str | wire.RunCommand | wire.CopyCommand)
            ]
        )

    def _ping(self, request: pb.PingRequest, context: grpc.ServicerContext) -> pb.PingResponse:
        self.pings.append(request.id)
        self.on_ping(context)
        return pb.PingResponse(id=request.id)

    def _lines(self, stream: str, request: pb.LogMessage) -> pb.Empty:
        self._log(Log(stream, lines=request.line))
        return pb.Empty()

    def _log(self, log: Log) -> None:
        self.on_log(log)
        with self._log_lock:
            self.logs.append(log)

    def _abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.Empty:
        self.aborts.append(Abort(request.error))
        return pb.Empty()

    def _success(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.Empty:
        self.successes += 1
        return pb.Empty()

    def _resource(self, request: pb.ResourceRequest, context: grpc.ServicerContext) -> Iterator[Message]:
        self.requests.append(request)
        chunks = self.resources.get(request.path)
        if chunks is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no resource {request.path}")
        elif callable(chunks):
            yield from chunks(context)
        else:
            yield from chunks
