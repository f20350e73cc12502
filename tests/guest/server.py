"""A small bootstrap server over mutual TLS that does what a test tells it, right or wrong."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from guest.pki import Pki

Chunks = Sequence[pb.ResourceChunk] | Callable[[grpc.ServicerContext], Iterator[pb.ResourceChunk]]


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


def group(**fields: bool) -> pb.ResourceChunk:
    return pb.ResourceChunk(group=pb.ResourceChunk.Group(**fields))


def piece(data: bytes, checksum: int | None = None) -> pb.ResourceChunk:
    number = zlib.crc32(data) if checksum is None else checksum
    return pb.ResourceChunk(piece=pb.ResourceChunk.Piece(checksum=number, data=data))


END = piece(bytes(1024))


def member(name: str, content: bytes = b"", kind: tar.Kind = tar.FILE, **fields: Any) -> bytes:
    """One entry of a packed stream with its content."""
    entry = tar.Entry(name, kind, **{"mode": 0o644, "size": len(content), **fields})
    return tar.encode(entry, entry.stored)[0] + content + bytes(-len(content) % tar.BLOCK)


def packed(chunks: Sequence[pb.ResourceChunk]) -> list[pb.ResourceChunk]:
    """What a server sends in place of well-formed entries to a guest that takes files packed."""
    found: list[pb.ResourceChunk] = []
    for message in chunks:
        if message.HasField("header"):
            header, content = message.header, b""
        elif message.HasField("chunk"):
            content += message.chunk.chunk
        elif header.kind == pb.ENTRY_KIND_UNSPECIFIED:
            return list(chunks)  # of an old server, which packs nothing
        else:
            flags = {"fromDirectory": header.fromDirectory, "keepOwner": header.keepOwner}
            found.append(group(**flags, ofTree=header.ofTree))
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
    return [*found, END]


class BuildServer:
    """Serves commands and resources, and records every call of the guest."""

    def __init__(self, pki: Pki, *, port: int = 0) -> None:
        self.commands: list[str] = []
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
        credentials = grpc.ssl_server_credentials(
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
        return grpc.method_handlers_generic_handler(wire.SERVICE, handlers)

    def _noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(request: Any, context: grpc.ServicerContext) -> Any:
            self.hellos.append((name, tuple(context.invocation_metadata())))
            return function(request, context)

        return noted

    def _commands(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        self.on_commands(context)
        return pb.CommandsResponse(command=self.commands)

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

    def _resource(
        self, request: pb.ResourceRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResourceChunk]:
        self.requests.append(request)
        chunks = self.resources.get(request.path)
        if chunks is None:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no resource {request.path}")
        elif callable(chunks):
            yield from chunks(context)
        else:
            yield from chunks
