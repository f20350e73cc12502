"""The calls to the bootstrap server, over one mutual-TLS channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grpc

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .errors import GuestError, ServerLost
from .stop import Stop

Stream = Literal["stdout", "stderr"]

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_FAREWELL_SECONDS = 10.0
# What gRPC's core says when TLS itself refused; trying again can't help.
_TLS_REFUSALS = ("certificate", "handshake failed", "ssl", "verification check failed")


def failure(error: grpc.RpcError) -> str:
    """Put a failed call into words: the status code and what gRPC knows about it."""
    code, details = error.code(), error.details()
    return f"{code.name}: {details}" if details else str(code.name)


class Client:
    """The guest's side of the protocol.

    Args:
        block: where the server is and the credentials for it; the private key stays in memory.
        stop: its reason ends every call that is under way.
        connect_timeout: how many seconds the very first call is retried while nobody answers.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        block: wire.BootstrapBlock,
        stop: Stop,
        *,
        connect_timeout: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=block.ca_chain.encode(),
            private_key=block.key.encode(),
            certificate_chain=block.cert.encode(),
        )
        self._channel = grpc.secure_channel(block.host_port, credentials, options=_options(block.server_name))
        self._block = block
        self._stop = stop
        self._connect_timeout = connect_timeout
        self._clock = clock
        empty = pb.Empty
        self._commands = self._unary("Commands", pb.CommandsResponse)
        self._ping = self._unary("Ping", pb.PingResponse)
        self._logs = {"stdout": self._unary("StdOut", empty), "stderr": self._unary("StdErr", empty)}
        self._abort = self._unary("Abort", empty)
        self._success = self._unary("Success", empty)
        self._resource = self._channel.unary_stream(
            wire.method("Resource"),
            request_serializer=pb.ResourceRequest.SerializeToString,
            response_deserializer=pb.ResourceChunk.FromString,
        )

    def _unary(self, name: str, response: Any) -> Any:
        return self._channel.unary_unary(
            wire.method(name),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )

    def close(self) -> None:
        """End the channel and all calls on it."""
        self._channel.close()

    def commands(self) -> list[str]:
        """Fetch the commands: the first call, retried while the server can't be reached.

        Raises:
            ServerLost: it stayed out of reach, or TLS or the server refused this guest.
        """
        deadline = self._clock() + self._connect_timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return list(self._call(self._commands, pb.Empty(), self._connect_timeout).command)
            except grpc.RpcError as error:
                self._stop.check()
                why = failure(error)
                refused = any(word in why.lower() for word in _TLS_REFUSALS)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or refused or self._clock() > deadline:
                    raise ServerLost(self._cannot_connect(why, refused)) from error
            self._stop.wait(pause)
            self._stop.check()
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _cannot_connect(self, why: str, refused: bool) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        hint = f" (the name, the CA or the validity does not fit; the guest's clock says {clock})"
        return (
            f"no build to be had from the server {self._block.host_port} "
            f"as {self._block.server_name}: {why}{hint if refused else ''}"
        )

    def ping(self, identifier: str, timeout: float) -> bool:
        """Send a sign of life; False when it was not answered properly within `timeout` seconds.

        The first servers know no pings; that they say so is an answer.
        """
        try:
            response = self._ping(
                pb.PingRequest(id=identifier), timeout=timeout, metadata=(wire.GUEST_HELLO,)
            )
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNIMPLEMENTED
        except ValueError:  # the channel is closed
            return False
        return bool(response.id == identifier)

    def log(self, stream: Stream, message: pb.LogMessage) -> None:
        """Relay output or a step's event; returns when the server has taken it.

        Raises:
            ServerLost: the call failed.
        """
        try:
            self._call(self._logs[stream], message, None)
        except grpc.RpcError as error:
            self._stop.check()
            raise ServerLost(f"the server no longer takes output: {failure(error)}") from error

    def resource(self, path: str) -> Iterator[pb.ResourceChunk]:
        """Ask for the files of a COPY or ADD, by the command's source alone, and yield what comes.

        Raises:
            ServerLost: the server reported an error or broke off the stream.
        """
        request = pb.ResourceRequest(path=path)
        call = self._resource(request, metadata=(wire.GUEST_HELLO,))
        try:
            with self._stop.calling(call.cancel):
                yield from call
        except grpc.RpcError as error:
            self._stop.check()
            message = f"the server broke off the files of {path!r}: {failure(error)}"
            raise ServerLost(message, reason="protocol") from error
        finally:
            call.cancel()

    def success(self) -> None:
        """Report that every command has been executed.

        Raises:
            ServerLost: the call failed.
        """
        try:
            self._call(self._success, pb.Empty(), _FAREWELL_SECONDS)
        except grpc.RpcError as error:
            raise ServerLost(f"the server did not take the success: {failure(error)}") from error

    def abort(self, error: GuestError) -> bool:
        """Report a failure; False when the server did not take it. Never raises: it is the last call."""
        text = error.message.encode("utf-8", "replace").decode()  # names of files need not be UTF-8
        request = pb.AbortRequest(error=text, step=error.step, exit_code=error.exit_code, reason=error.reason)
        try:
            self._abort(request, timeout=_FAREWELL_SECONDS, metadata=(wire.GUEST_HELLO,))
        except (grpc.RpcError, ValueError):
            return False
        return True

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        call = method.future(request, timeout=timeout, metadata=(wire.GUEST_HELLO,))
        with self._stop.calling(call.cancel):
            try:
                return call.result()
            except grpc.FutureCancelledError as error:
                self._stop.check()
                raise ServerLost("the connection to the server was closed") from error


def _options(server_name: str) -> list[tuple[str, Any]]:
    return [
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        # Not min_reconnect_backoff_ms: the core also takes it for the time that a connection attempt,
        # TLS handshake included, may last.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
