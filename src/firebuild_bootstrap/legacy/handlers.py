"""The seven calls of old guests, which know no `Session`; who may call is decided in `service.server`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.service.session import Session, StepEvents
from firebuild_pki.display import counted

from .old_guest import OldGuest

_WAY: Final = "the calls of old guests"
_EMPTY: Final = pb.Empty()
_Request = TypeVar("_Request", bound=Message)

# What a guest can make the server keep is bounded: here its requests, in `service.server` the number of them.
_SMALL_BYTES: Final = 128 * 1024
_COMMANDS_AT_ONCE: Final = 2
_LOOK_SECONDS: Final = 0.1


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
        self._guest = OldGuest(commands, resources, session=session, events=steps)
        self._large = threading.Lock()
        self._commands_on_their_way = threading.Semaphore(_COMMANDS_AT_ONCE)

    def close(self) -> None:
        """Let go of files that the guest did not fetch to their end."""
        self._guest.close()

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """Return all seven methods for `grpc.Server.add_generic_rpc_handlers`."""
        small, large, progress = _SMALL_BYTES, wire.MAX_MESSAGE_BYTES, self._guest.progress
        # The requests come as bytes: Python's gRPC would parse as many at once as come, and write a traceback
        # about those that can't be parsed.
        methods = {
            "Commands": self._unary(self.commands, pb.Empty, small),
            "Ping": self._unary(lambda ping, _: pb.PingResponse(id=ping.id), pb.PingRequest, small),
            "StdOut": self._told(lambda log: progress.output("stdout", log.line), pb.LogMessage, large),
            "StdErr": self._told(lambda log: progress.output("stderr", log.line), pb.LogMessage, large),
            "Abort": self._told(lambda abort: progress.abort(abort.error), pb.AbortRequest, large),
            "Success": self._told(lambda _: progress.success(), pb.Empty, small),
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

    def _told(
        self, behaviour: Callable[[_Request], object], request: type[_Request], most: int
    ) -> grpc.RpcMethodHandler[Any, Any]:
        def answer(message: _Request, _: grpc.ServicerContext) -> Message:
            behaviour(message)
            return _EMPTY

        return self._unary(answer, request, most)

    def commands(self, _: pb.Empty, context: grpc.ServicerContext) -> pb.CommandsResponse:
        """Return what the guest is to do.

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
        return pb.CommandsResponse(command=self._guest.commands())

    def resource(
        self, request: pb.ResourceRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ResourceChunk]:
        """Stream one resource; gRPC asks for the next chunk when the last one has left.

        Raises:
            InputError: there is no such resource, or it cannot be read.
        """
        self._session.speaks(_WAY)
        path = f"{request.stage}://{request.path}" if request.stage else request.path
        context.add_callback(lambda: self._guest.lost(path))
        for chunk in self._guest.chunks(path):
            self._session.touch()  # each is a sign of life of the guest that takes it
            yield chunk


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
