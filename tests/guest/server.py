"""A small bootstrap server over mutual TLS that does what a test tells it, right or wrong."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.legacy.scripts import encode_command
from guest.pki import Pki

Message = pb.ResourceChunk | pb.ToGuest
Chunks = Sequence[Message] | Callable[[grpc.ServicerContext], Iterator[Message]]


def header(name: str = "f", **fields: Any) -> pb.ResourceChunk:
    fields = {"sourcePath": name, "id": name, "kind": pb.ENTRY_KIND_FILE, "fileMode": 0o644, **fields}
    fields.setdefault("entryPath", name)
    return pb.ResourceChunk(header=pb.ResourceChunk.ResourceHeader(**fields))


def chunk(data: bytes, name: str = "f", checksum: bytes | None = None) -> pb.ResourceChunk:
    digest = wire.checksum(data) if checksum is None else checksum
    return pb.ResourceChunk(chunk=pb.ResourceChunk.ResourceContents(chunk=data, checksum=digest, id=name))


def eof(name: str = "f") -> pb.ResourceChunk:
    return pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id=name))


def a_file(name: str, data: bytes = b"", **fields: Any) -> list[pb.ResourceChunk]:
    chunks = [chunk(data, name)] if data else []
    return [header(name, size=len(data), **fields), *chunks, eof(name)]


def in_tree(name: str, data: bytes = b"", **fields: Any) -> list[pb.ResourceChunk]:
    return a_file(name, data, fromDirectory=True, **fields)


def a_directory(name: str, mode: int = 0o755, **fields: Any) -> list[pb.ResourceChunk]:
    fields = {"kind": pb.ENTRY_KIND_DIRECTORY, "fileMode": mode, "fromDirectory": True, **fields}
    return [header(name, **fields), eof(name)]


def a_link(name: str, text: str, *, hard: bool = False, **fields: Any) -> list[pb.ResourceChunk]:
    kind = pb.ENTRY_KIND_HARDLINK if hard else pb.ENTRY_KIND_SYMLINK
    fields = {"kind": kind, "linkTarget": text, "fromDirectory": True, **fields}
    return [header(name, **fields), eof(name)]


_KINDS: dict[int, tar.Kind] = {
    pb.ENTRY_KIND_FILE: tar.FILE,
    pb.ENTRY_KIND_DIRECTORY: tar.DIRECTORY,
    pb.ENTRY_KIND_SYMLINK: tar.SYMLINK,
    pb.ENTRY_KIND_HARDLINK: tar.HARDLINK,
}


def group(**fields: bool) -> pb.ToGuest:
    return pb.ToGuest(group=pb.Group(**fields))


def piece(data: bytes) -> pb.ToGuest:
    return pb.ToGuest(piece=pb.Piece(data=data))


END = piece(bytes(1024))


def member(name: str, content: bytes = b"", kind: tar.Kind = tar.FILE, **fields: Any) -> bytes:
    """One entry of a packed stream with its content."""
    entry = tar.Entry(name, kind, **{"mode": 0o644, "size": len(content), **fields})
    return tar.encode(entry, entry.stored)[0] + content + bytes(-len(content) % tar.BLOCK)


def packed(chunks: Sequence[Message]) -> list[pb.ToGuest]:
    """What a session sends in place of well-formed entries."""
    found: list[pb.ToGuest] = []
    for message in chunks:
        if isinstance(message, pb.ToGuest):
            return [each for each in chunks if isinstance(each, pb.ToGuest)]
        if message.HasField("header"):
            header, content = message.header, b""
        elif message.HasField("chunk"):
            content += message.chunk.chunk
        else:
            found.append(
                group(from_directory=header.fromDirectory, keep_owner=header.keepOwner, of_tree=header.ofTree)
            )
            data = member(
                header.entryPath,
                content,
                _KINDS[header.kind],
                mode=header.fileMode,
                uid=header.uid,
                gid=header.gid,
                mtime_ns=header.mtimeNs,
                linkname=header.linkTarget,
            )
            found += [piece(data[:700])]
            found += [piece(data[at : at + 1024 * 1024]) for at in range(700, len(data), 1024 * 1024)]
    return [*found, END] if found else []


class BuildServer:
    """Serves commands and resources in a session, or in the calls of old; records what the guest says.

    What comes in a session is recorded as the calls of old would be.
    """

    def __init__(self, pki: Pki, *, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> None:
        self.old = False
        self.commands: list[wire.AnyCommand | pb.ToGuest | str] = []
        self.layers: list[bytes] = []
        self.wants: list[str] = []
        self.meanwhile: list[pb.ToGuest | None] = []
        """What is sent while a command is at work; None waits until the guest has said something."""
        self.said: list[pb.FromGuest] = []
        self.resources: dict[str, Chunks] = {}
        self.logs: list[tuple[str, pb.LogMessage]] = []
        self.aborts: list[pb.AbortRequest] = []
        self.successes = 0
        self.pings: list[str] = []
        self.requests: list[pb.ResourceRequest] = []
        self.hellos: list[tuple[str, tuple[Any, ...]]] = []
        self.on_log: Callable[[pb.LogMessage], None] = lambda message: None
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
        return b"".join(message.data for name, message in self.logs if name == stream)

    @property
    def stdout(self) -> bytes:
        return self.written("stdout")

    @property
    def events(self) -> list[tuple[int, str, int]]:
        named = [(message.step, message.event) for _, message in self.logs if message.HasField("event")]
        return [(step, pb.StepEvent.Kind.Name(event.kind), event.exit_code) for step, event in named]

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
            "StdOut": (lambda request, context: self._log("stdout", request), pb.LogMessage),
            "StdErr": (lambda request, context: self._log("stderr", request), pb.LogMessage),
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
        self.hellos.append(("Session", tuple(context.invocation_metadata())))
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
                started = pb.StepEvent(kind=pb.StepEvent.STARTED)
                self.logs.append(("stdout", pb.LogMessage(step=command.step, event=started)))
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
                        self._log(stream, pb.LogMessage(data=message.output.data, step=self._step))
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
            yield message.SerializeToString()
        yield pb.ToGuest(files_end=pb.FilesEnd()).SerializeToString()

    def _done(self, done: pb.Done) -> bool:
        failed = done.HasField("failure")
        if done.failure.reason == "gone":
            return False
        if done.step:
            event = pb.StepEvent(
                kind=pb.StepEvent.FINISHED, exit_code=(done.failure.exit_code or 1) if failed else 0
            )
            self.logs.append(("stdout", pb.LogMessage(step=done.step, event=event)))
        if failed:
            why = done.failure
            self.aborts.append(
                pb.AbortRequest(error=why.error, step=done.step, exit_code=why.exit_code, reason=why.reason)
            )
        return not failed

    # --- the calls of old ---------------------------------------------------------------------

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(request: Any, context: grpc.ServicerContext) -> Any:
            self.hellos.append((name, tuple(context.invocation_metadata())))
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

    def _log(self, stream: str, request: pb.LogMessage) -> pb.Empty:
        self.on_log(request)
        with self._log_lock:
            self.logs.append((stream, request))
        return pb.Empty()

    def _abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.Empty:
        self.aborts.append(request)
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
