"""A server as they are in the field, with all that they get wrong; written from the facts about them.

It resolves a few instructions as such a server does, and speaks only the first fields of every message.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

CHUNK = int(4 * 1024 * 1024 * 0.9)


@dataclass(frozen=True)
class Resolved:
    """What one match of a source became; `source` and `target` as they are written."""

    path: Path
    source: str
    target: str
    workdir: str
    user: str


def attribute(value: str) -> dict[str, str]:
    return {"OriginalCommand": "", "Value": value}


@dataclass
class OldBuild:
    """What a Dockerfile becomes: commands, and resources by their source."""

    context: Path
    workdir: str = "/"
    user: str = "0:0"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    resources: dict[str, list[Resolved]] = field(default_factory=dict)
    pings: bool = True

    def run(self, original: str, *commands: str) -> None:
        """RUN; an exec form comes as several commands. The environment is shared: later ENVs show up too."""
        for command in commands or (original.removeprefix("RUN "),):
            self.commands.append(
                {
                    "OriginalCommand": original,
                    "Args": self.args,
                    "Command": command,
                    "Env": self.env,
                    "Shell": {"OriginalCommand": "", "Commands": list(self.shell)},
                    "Workdir": attribute(self.workdir),
                    "User": attribute(self.user),
                }
            )

    def copy(
        self, source: str, target: str, *, chown: str | None = None, stage: str = "", keyword: str = "COPY"
    ) -> None:
        """COPY or ADD; what several commands with one source have is the target of the last."""
        path = self.context / source.lstrip("/")
        if stage:
            self._copy_from_stage(path, source, target, chown, stage)
            return
        self._add_copy(keyword, source, target, chown, "", "", f"{keyword} {source} {target}")
        found = [Resolved(path, source, target, self.workdir, chown or self.user)] if path.exists() else []
        self.resources[source] = found

    def _copy_from_stage(self, path: Path, source: str, target: str, chown: str | None, stage: str) -> None:
        """Each file is a command, its name below the target; they share one resource, which is the last."""
        original = f"COPY --from={stage} {source} {target}"
        for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
            place = os.path.normpath(f"{target}/{file.name}")
            key = f"{stage}://{source}"
            self._add_copy("COPY", key, place, chown, str(file), stage, original)
            self.resources[key] = [Resolved(file, source, place, "", chown or "")]

    def _add_copy(
        self,
        keyword: str,
        source: str,
        target: str,
        chown: str | None,
        origin: str,
        stage: str,
        original: str,
    ) -> None:
        command: dict[str, Any] = {
            "OriginalCommand": original,
            "OriginalSource": origin if stage else str(self.context / "Dockerfile"),
            "Source": source,
            "Target": target,
            "Workdir": attribute(self.workdir),
            "User": attribute(self.user),
            "UserFromLocalChown": None if chown is None else attribute(chown),
        }
        if keyword == "COPY":
            command["Stage"] = stage
        self.commands.append(command)


def chunk(data: bytes, claimed: bytes | None = None) -> pb.ResourceChunk:
    digest = hashlib.sha256(data if claimed is None else claimed).digest()
    return pb.ResourceChunk(chunk=pb.ResourceChunk.ResourceContents(chunk=data, checksum=digest, id="c"))


def head(path: Path, found: Resolved, inner: str) -> pb.ResourceChunk:
    joined = [os.path.normpath(os.path.join(base, inner)) for base in (found.source, found.target)]
    return pb.ResourceChunk(
        header=pb.ResourceChunk.ResourceHeader(
            sourcePath=joined[0] if inner or path.is_dir() else found.source,
            targetPath=joined[1] if inner or path.is_dir() else found.target,
            fileMode=path.lstat().st_mode & 0o777,
            isDir=path.is_dir() and not path.is_symlink(),
            targetUser=found.user,
            targetWorkdir=found.workdir,
            id="h",
        )
    )


_EOF = pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id="e"))


def walk(found: Resolved) -> Iterator[pb.ResourceChunk]:
    """A directory: in lexical order, one buffer for all chunks of a file, links opened like files."""
    pending = [""]
    while pending:
        inner = pending.pop(0)
        path = found.path / inner if inner else found.path
        yield head(path, found, inner)
        if path.is_dir() and not path.is_symlink():
            pending = [os.path.join(inner, name) for name in sorted(os.listdir(path))] + pending
        elif path.is_dir() or not path.exists():
            while True:
                yield chunk(b"")
                time.sleep(0.001)
        else:
            data = path.read_bytes()
            parts = [data[offset : offset + CHUNK] for offset in range(0, len(data), CHUNK)]
            for part, following in zip(parts, [*parts[1:], b""], strict=True):
                # The next chunk is read into the same buffer before this one has left.
                yield chunk(following + part[len(following) :], claimed=part)
        yield _EOF


def single(found: Resolved) -> Iterator[pb.ResourceChunk]:
    yield head(found.path, found, "")
    with found.path.open("rb") as file:
        while data := file.read(CHUNK):
            yield chunk(data)
    yield _EOF


class OldServer:
    """Serves one build and records what the guest says."""

    def __init__(self, build: OldBuild, *, key: bytes, certificate: bytes, client_ca: bytes) -> None:
        self.build = build
        self.calls: list[str] = []
        self.lines: dict[str, list[str]] = {"StdOut": [], "StdErr": []}
        self.aborted: list[str] = []
        self.succeeded = 0
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8),
            options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1)],
        )
        self._server.add_generic_rpc_handlers((self._handlers(),))
        credentials = grpc.ssl_server_credentials([(key, certificate)], client_ca, require_client_auth=True)
        self.port = self._server.add_secure_port("127.0.0.1:0", credentials)

    def __enter__(self) -> OldServer:
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(0).wait()

    def _handlers(self) -> grpc.GenericRpcHandler:
        unary: dict[str, Any] = {
            "Commands": (pb.Empty, lambda request: self._commands()),
            "Ping": (pb.PingRequest, lambda request: pb.PingResponse(id=request.id)),
            "StdOut": (pb.LogMessage, lambda request: self._log("StdOut", request)),
            "StdErr": (pb.LogMessage, lambda request: self._log("StdErr", request)),
            "Abort": (pb.AbortRequest, lambda request: self.aborted.append(request.error) or pb.Empty()),  # type: ignore[func-returns-value]
            "Success": (pb.Empty, lambda request: self._success()),
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._noted(name, function),
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
            for name, (request, function) in unary.items()
            if name != "Ping" or self.build.pings
        }
        handlers["Resource"] = grpc.unary_stream_rpc_method_handler(
            self._resource,
            request_deserializer=pb.ResourceRequest.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        return grpc.method_handlers_generic_handler("proto.RootfsServer", handlers)

    def _noted(self, name: str, function: Any) -> Any:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            with self._lock:
                self.calls.append(name)
                if name == "Ping" and "Commands" not in self.calls:
                    os.abort()  # which is what it comes to
                return function(request)

        return call

    def _commands(self) -> pb.CommandsResponse:
        return pb.CommandsResponse(command=[json.dumps(command) for command in self.build.commands])

    def _log(self, name: str, request: pb.LogMessage) -> pb.Empty:
        self.lines[name] += request.line
        return pb.Empty()

    def _success(self) -> pb.Empty:
        self.succeeded += 1
        return pb.Empty()

    def _resource(
        self, request: pb.ResourceRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResourceChunk]:
        self.requests.append((request.path, request.stage))
        if request.path not in self.build.resources:
            context.abort(grpc.StatusCode.UNKNOWN, f"not found: '{request.stage}/{request.path}'")
        for found in self.build.resources[request.path]:
            for message in walk(found) if found.path.is_dir() else single(found):
                if not context.is_active():
                    return
                yield message
