"""The seven methods of the service. Who may call them is decided in `guard.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import grpc
from google.protobuf.message import Message

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import InputError, StepFailed
from firebuild_bootstrap.service.oldguest import OldGuest
from firebuild_bootstrap.service.outcome import Ending, Outcome
from firebuild_bootstrap.service.resources import Delivery
from firebuild_bootstrap.service.session import Session
from firebuild_bootstrap.service.steps import StepEvents
from firebuild_pki.display import block

_EMPTY: Final = pb.Empty()
# Characters of what a guest says about its failure.
_MAX_REASON: Final = 4000


class Handlers:
    """Answers calls that passed the guard; what it raises ends the build.

    Args:
        session: the build.
        commands: what `Commands` returns, encoded.
        resources: by `source` of the command that asks for them.
        steps: takes the begin and end of steps.
    """

    def __init__(
        self,
        session: Session,
        *,
        commands: Sequence[str],
        resources: Mapping[str, Resource],
        steps: StepEvents,
    ) -> None:
        self._session = session
        self._commands = tuple(commands)
        self._resources = resources
        self._deliveries = _deliveries(commands, resources)
        self._steps = steps
        self._old: OldGuest | None = None
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of files that an old guest did not fetch to their end."""
        if self._old is not None:
            self._old.close()

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """Return all seven methods for `grpc.Server.add_generic_rpc_handlers`."""
        unary: dict[str, tuple[Callable[..., Message], type[Message]]] = {
            "Commands": (self.commands, pb.Empty),
            "Ping": (self.ping, pb.PingRequest),
            "StdOut": (self.stdout, pb.LogMessage),
            "StdErr": (self.stderr, pb.LogMessage),
            "Abort": (self.abort, pb.AbortRequest),
            "Success": (self.success, pb.Empty),
        }
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour,
                request_deserializer=request.FromString,
                response_serializer=_serialize,
            )
            for name, (behaviour, request) in unary.items()
        }
        methods["Resource"] = grpc.unary_stream_rpc_method_handler(
            self.resource,
            request_deserializer=pb.ResourceRequest.FromString,
            response_serializer=_serialize,
        )
        return grpc.method_handlers_generic_handler(wire.SERVICE, methods)

    def commands(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        """Return every command of the build, for a guest that does not announce itself in other words.

        Raises:
            InputError: the build can't come out right with such a guest.
        """
        if _extended(context):
            return pb.CommandsResponse(command=self._commands)
        with self._lock:
            if self._old is None:
                decoded = [command for text in self._commands if (command := wire.decode_command(text))]
                self._old = OldGuest(decoded, self._resources, session=self._session, events=self._steps)
            return pb.CommandsResponse(command=self._old.commands)

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
        path = f"{request.stage}://{request.path}" if request.stage else request.path
        if not _extended(context):
            yield from self._alive(self._old_chunks(path, context))
            return
        delivery = self._deliveries.get(path)
        if delivery is None:
            raise InputError(
                f"the guest asked for the resource {path!r:.200}, which this build does not have"
            )
        yield from self._alive(delivery.chunks())

    def _old_chunks(self, path: str, context: grpc.ServicerContext) -> Iterator[pb.ResourceChunk]:
        old = self._old
        if old is None:
            raise InputError("the guest asked for files before it asked for commands")
        context.add_callback(lambda: old.lost(path))
        yield from old.chunks(path)

    def _alive(self, chunks: Iterator[pb.ResourceChunk]) -> Iterator[pb.ResourceChunk]:
        """Pass chunks on; each is a sign of life of the guest that takes it."""
        for chunk in chunks:
            self._session.touch()
            yield chunk

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
        # The exit status of other failures means nothing.
        exit_code = request.exit_code if request.reason == "command" else None
        step = self._steps.known(request.step)
        error = StepFailed(
            block(request.error, _MAX_REASON) or "the guest gave no reason", step=step, exit_code=exit_code
        )
        self._session.end(
            Outcome(
                ending=Ending.ABORTED,
                error=error,
                step=step,
                exit_code=exit_code,
                reason=request.reason,
            )
        )
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
        data = message.data or b"".join(_line(line) for line in message.line)
        if data:
            self._session.output.write(step, stream, data)
        return _EMPTY

    def _step_event(self, number: int, event: pb.StepEvent) -> None:
        if not number:
            raise InputError("the guest reports the begin or end of a step without its number")
        if event.kind == pb.StepEvent.STARTED:
            self._steps.started(number)
        elif event.kind == pb.StepEvent.FINISHED:
            self._steps.finished(number, event.exit_code, event.duration_ms / 1000)


def _extended(context: grpc.ServicerContext) -> bool:
    """Tell whether the guest announces itself."""
    return any(entry == wire.GUEST_HELLO for entry in context.invocation_metadata())


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _line(text: str) -> bytes:
    return text.encode() if text.endswith("\n") else text.encode() + b"\n"


def _deliveries(commands: Sequence[str], resources: Mapping[str, Resource]) -> dict[str, Delivery]:
    decoded = (wire.decode_command(command) for command in commands)
    copies = {command.source: command for command in decoded if isinstance(command, wire.CopyCommand)}
    missing = sorted(copies.keys() ^ resources.keys())
    if missing:
        raise ValueError(f"commands and resources do not fit together: {', '.join(missing)}")
    return {source: Delivery(resource, copies[source]) for source, resource in resources.items()}
