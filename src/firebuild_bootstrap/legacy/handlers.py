"""The seven calls of guests that know no `Session`: old ones, and ours of earlier versions.

Who may call is decided in `service.server`. Guests of ours get the steps as commands in JSON, and files as
entries that say what they are; what is told to those that do not announce themselves is in old_guest.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, Literal, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry, Resource, content
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.service.reporting import aborted
from firebuild_bootstrap.service.session import Session, StepEvents
from firebuild_pki.display import counted

from .copying import plain
from .old_guest import OldGuest, TooOld, messages
from .scripts import encode_command

HELLO: Final = ("firebuild-guest", "1")
"""The metadata of each call of a guest of ours; later ones said more besides."""
_WAY: Final = "the calls of old guests"
_EMPTY: Final = pb.Empty()
_Request = TypeVar("_Request", bound=Message)

# What a guest can make the server keep is bounded: here its requests, in `service.server` the number of them.
_SMALL_BYTES: Final = 128 * 1024
_COMMANDS_AT_ONCE: Final = 2
_LOOK_SECONDS: Final = 0.1
_KINDS: Final = {
    tar.FILE: pb.ENTRY_KIND_FILE,
    tar.DIRECTORY: pb.ENTRY_KIND_DIRECTORY,
    tar.SYMLINK: pb.ENTRY_KIND_SYMLINK,
    tar.HARDLINK: pb.ENTRY_KIND_HARDLINK,
}


class Handlers:
    """Answers calls that passed the guard; what it raises ends the build.

    Args:
        session: the build.
        commands: its steps.
        resources: by `source` of the command that asks for them.
        steps: takes the begin and end of steps.
    """

    def __init__(
        self,
        session: Session,
        *,
        commands: Sequence[wire.AnyCommand],
        resources: Mapping[str, Resource],
        steps: StepEvents,
    ) -> None:
        self._session = session
        self._commands = tuple(commands)
        self._resources = resources
        self._steps = steps
        self._texts: tuple[str, ...] = ()
        self._old: OldGuest | None = None
        self._lock = threading.Lock()
        self._large = threading.Lock()
        self._commands_on_their_way = threading.Semaphore(_COMMANDS_AT_ONCE)

    def close(self) -> None:
        """Let go of files that an old guest did not fetch to their end."""
        if self._old is not None:
            self._old.close()

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """Return all seven methods for `grpc.Server.add_generic_rpc_handlers`."""
        small, large = _SMALL_BYTES, wire.MAX_MESSAGE_BYTES
        # The requests come as bytes: Python's gRPC would parse as many at once as come, and write a traceback
        # about those that can't be parsed.
        methods = {
            "Commands": self._unary(self.commands, pb.Empty, small),
            "Ping": self._unary(self.ping, pb.PingRequest, small),
            "StdOut": self._unary(self.stdout, pb.LogMessage, large),
            "StdErr": self._unary(self.stderr, pb.LogMessage, large),
            "Abort": self._unary(self.abort, pb.AbortRequest, large),
            "Success": self._unary(self.success, pb.Empty, small),
            "Resource": grpc.unary_stream_rpc_method_handler(
                lambda data, context: self.resource(_parsed(pb.ResourceRequest, data, small), context),
                response_serializer=_serialize,
            ),
        }
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)

    def _unary(
        self,
        behaviour: Callable[[_Request, grpc.ServicerContext], Message],
        request: type[_Request],
        most: int,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def call(data: bytes, context: grpc.ServicerContext) -> Message:
            self._session.speaks(_WAY)
            # Two million empty lines fit into a message, and take twenty times its size: one such at a time.
            with self._large if len(data) > _SMALL_BYTES else nullcontext():
                return behaviour(_parsed(request, data, most), context)

        return grpc.unary_unary_rpc_method_handler(call, response_serializer=_serialize)

    def commands(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        """Return every command of the build, for a guest that does not announce itself in other words.

        Raises:
            InputError: the build can't come out right with such a guest.
        """
        # The answer stays in memory until the guest has read it.
        while not self._commands_on_their_way.acquire(timeout=_LOOK_SECONDS):
            self._session.touch()
            if not context.is_active():
                return pb.CommandsResponse()
        if not context.add_callback(self._commands_on_their_way.release):
            self._commands_on_their_way.release()
        with self._lock:
            return pb.CommandsResponse(command=self._told(_extended(context)))

    def _told(self, extended: bool) -> Sequence[str]:
        for command in self._commands:
            if isinstance(command, wire.RunCommand) and (command.mounts or command.network != "default"):
                raise TooOld("has --mount or --network, which it does not know", command.step)
        if extended:
            self._texts = self._texts or tuple(map(encode_command, self._commands))
            # Each is a string of the answer: its tag and its length take up to six bytes more.
            if sum(len(text.encode()) + 6 for text in self._texts) > wire.MAX_MESSAGE_BYTES:
                raise TooOld("the steps take more than one message of the protocol")
            return self._texts
        if self._old is None:
            self._old = OldGuest(self._commands, self._resources, session=self._session, events=self._steps)
        return self._old.commands

    def ping(self, request: pb.PingRequest, _: grpc.ServicerContext) -> pb.PingResponse:
        """Echo the id; that the guest lives was noted before."""
        return pb.PingResponse(id=request.id)

    def resource(
        self, request: pb.ResourceRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResourceChunk]:
        """Stream one resource; gRPC asks for the next chunk when the last one has left.

        Raises:
            InputError: there is no such resource, or it cannot be read.
        """
        self._session.speaks(_WAY)
        path = f"{request.stage}://{request.path}" if request.stage else request.path
        for chunk in self._chunks(path) if _extended(context) else self._old_chunks(path, context):
            self._session.touch()  # each is a sign of life of the guest that takes it
            yield chunk

    def _old_chunks(self, path: str, context: grpc.ServicerContext) -> Iterator[pb.ResourceChunk]:
        old = self._old
        if old is None:
            raise InputError("the guest asked for files before it asked for commands")
        context.add_callback(lambda: old.lost(path))
        yield from old.chunks(path)

    def _chunks(self, path: str) -> Iterator[pb.ResourceChunk]:
        copies = (command for command in self._commands if isinstance(command, wire.CopyCommand))
        command = next((copy for copy in copies if copy.source == path), None)
        if command is None:
            raise InputError(
                f"the guest asked for the resource {path!r:.200}, which this build does not have"
            )
        for number, entry in enumerate(plain(self._resources[path].entries()), start=1):
            data = content(entry) if entry.kind == tar.FILE else ()
            yield from messages(_header(command, entry, f"{path}-{number}"), data)

    def stdout(self, message: pb.LogMessage, context: grpc.ServicerContext) -> pb.Empty:
        """Pass output or the begin or end of a step on."""
        return self._log("stdout", message, context)

    def stderr(self, message: pb.LogMessage, context: grpc.ServicerContext) -> pb.Empty:
        """Do the same for standard error."""
        return self._log("stderr", message, context)

    def abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.Empty:
        """End the build as failed."""
        if self._old is not None and not _extended(context):
            self._session.end(self._old.progress.abort(request.error))
            return _EMPTY
        step = self._steps.known(request.step)
        end = aborted(request.error, step=step, exit_code=request.exit_code, reason=request.reason)
        self._session.end(end)
        return _EMPTY

    def success(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.Empty:
        """End the build as done."""
        if self._old is not None and not _extended(context):
            self._session.end(self._old.progress.success())
        else:
            self._session.end(self._steps.success())
        return _EMPTY

    def _log(
        self, stream: Literal["stdout", "stderr"], message: pb.LogMessage, context: grpc.ServicerContext
    ) -> pb.Empty:
        if self._old is not None and not _extended(context):
            self._old.progress.output(stream, message.line)
            return _EMPTY
        step = self._steps.known(message.step)
        if message.HasField("event"):
            self._step_event(step, message.event)
        self._session.pass_on(step, stream, message.data or _joined(message.line))
        return _EMPTY

    def _step_event(self, number: int, event: pb.StepEvent) -> None:
        if not number:
            raise InputError("the guest reports the start or end of a step without its number")
        if event.kind == pb.StepEvent.STARTED:
            self._steps.started(number)
        elif event.kind == pb.StepEvent.FINISHED:
            self._steps.finished(number, event.exit_code, event.duration_ms / 1000)


def _extended(context: grpc.ServicerContext) -> bool:
    """Say whether the guest announces itself, and so understands what was added to the calls."""
    return HELLO in context.invocation_metadata()


def _header(command: wire.CopyCommand, entry: Entry, identity: str) -> pb.ResourceChunk.ResourceHeader:
    uid, gid = entry.owner or (0, 0)
    keeps = entry.owner is not None
    return pb.ResourceChunk.ResourceHeader(
        sourcePath=entry.source,
        targetPath=command.target,
        targetWorkdir=command.workdir,
        fileMode=entry.mode,
        isDir=entry.kind == tar.DIRECTORY,
        targetUser=f"{uid}:{gid}" if keeps else command.chown or "0:0",
        id=identity,
        kind=_KINDS[entry.kind],
        entryPath=entry.path,
        linkTarget=entry.link_target,
        size=entry.size,
        mtimeNs=entry.mtime_ns,
        fromDirectory=entry.from_directory,
        keepOwner=keeps,
        ofTree=keeps and not entry.member,
        uid=uid,
        gid=gid,
    )


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parsed(request: type[_Request], data: bytes, most: int) -> _Request:
    name = request.DESCRIPTOR.name
    if len(data) > most:
        raise InputError(f"the guest sent a {name} of {counted(len(data), 'byte')}; {most} are allowed")
    try:
        return request.FromString(data)
    except DecodeError:
        raise InputError(f"the guest sent bytes that are not a message {name}") from None


def _joined(lines: Sequence[str]) -> bytes:
    data = bytearray()  # not a list of them all: two million lines fit into a message
    for line in lines:
        data += line.encode()
        if not line.endswith("\n"):
            data += b"\n"
    return bytes(data)
