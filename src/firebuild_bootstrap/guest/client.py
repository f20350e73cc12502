"""The calls to the bootstrap server, over one mutual-TLS channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import grpc
from google.protobuf.message import DecodeError

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .errors import GuestError, ProtocolError, ServerLost
from .handshake import (
    Contact,
    Dropped,
    NotNow,
    Refusal,
    client_context,
    first_contact,
    has_nameless_issuer,
)
from .stop import Stop

Stream = Literal["stdout", "stderr"]
Message = pb.ResourceChunk | memoryview
"""Of a resource; a piece of a packed one is its data, as a view."""

CALL_SECONDS = 300.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
_SHORTEST_ATTEMPT = 0.5
# A server that closes connections after the handshake may be starting; one that does it so often refuses.
_MOST_DROPPED = 3
_FAREWELL_SECONDS = 10.0
# What gRPC's core says when TLS itself refused; trying again can't help.
_TLS_REFUSALS = ("certificate", "handshake failed", "ssl", "verification check failed")


def _opened(message: bytes) -> Message:
    try:
        if (piece := wire.decode_piece(message)) is not None:
            return piece
        parsed = pb.ResourceChunk.FromString(message)
        if not parsed.HasField("piece"):
            return parsed
        wire.check_piece(parsed.piece.data, parsed.piece.checksum)
        return memoryview(parsed.piece.data)
    except (wire.WireError, DecodeError) as error:
        raise ProtocolError(f"the server sent files that can't be read: {error}") from error


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
        call_timeout: seconds that the server may take to answer a later call, and between two messages of a
            stream. How long a step takes does not matter: it is the guest's own work.
        clock: monotonic seconds.

    Raises:
        InputError: the block holds no usable credentials.
    """

    def __init__(
        self,
        block: wire.BootstrapBlock,
        stop: Stop,
        *,
        connect_timeout: float = 30.0,
        call_timeout: float = CALL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = client_context(block)
        self._block = block
        self._stop = stop
        self._connect_timeout = connect_timeout
        self._call_timeout = call_timeout
        self._clock = clock
        self._calls: _Calls | None = None

    def close(self) -> None:
        """End the channel and all calls on it."""
        if self._calls is not None:
            self._calls.channel.close()

    def commands(self) -> list[str]:
        """Fetch the commands: the first call, retried while the server can't be reached.

        Raises:
            ServerLost: it stayed out of reach, or TLS or the server refused this guest.
        """
        deadline = self._clock() + self._connect_timeout
        pause, dropped = _FIRST_PAUSE, 0
        while True:
            try:
                return self._first_call(deadline)
            except Refusal as error:
                raise ServerLost(self._cannot_connect(str(error), refused=True)) from error
            except NotNow as error:
                self._stop.check()
                dropped = dropped + 1 if isinstance(error, Dropped) else 0
                if dropped == _MOST_DROPPED or self._clock() > deadline:
                    why = str(error) if dropped else f"UNAVAILABLE: {error}"
                    raise ServerLost(self._cannot_connect(why, refused=dropped > 0)) from error
            except grpc.RpcError as error:
                self._stop.check()
                why = failure(error)
                refused = any(word in why.lower() for word in _TLS_REFUSALS)
                if error.code() is not grpc.StatusCode.UNAVAILABLE or refused or self._clock() > deadline:
                    raise ServerLost(self._cannot_connect(why, refused)) from error
            self._stop.wait(pause)
            self._stop.check()
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _first_call(self, deadline: float) -> list[str]:
        timeout = max(deadline - self._clock(), _SHORTEST_ATTEMPT)
        return list(self._call(self._connect(timeout).commands, pb.Empty(), self._connect_timeout).command)

    def _connect(self, timeout: float) -> _Calls:
        if has_nameless_issuer(self._context):
            # gRPC's core takes these certificates, by their alternative names: old servers give no other.
            contact = Contact(self._block.ca_chain.encode(), "")
        else:
            contact = first_contact(self._block, self._context, self._stop, timeout)
        self.close()
        self._calls = _Calls(self._block, contact)
        return self._calls

    @property
    def _connected(self) -> _Calls:
        try:
            return self._calls or self._connect(self._connect_timeout)
        except (NotNow, Refusal) as error:
            raise ServerLost(self._cannot_connect(str(error), refused=False)) from error

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
            response = self._connected.ping(
                pb.PingRequest(id=identifier), timeout=timeout, metadata=wire.GUEST
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
            self._call(self._connected.logs[stream], message, self._call_timeout)
        except grpc.RpcError as error:
            self._stop.check()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                limit = f"{self._call_timeout:g} seconds"
                raise ServerLost(f"the server did not take the output within {limit}") from error
            raise ServerLost(f"the server no longer takes output: {failure(error)}") from error

    def resource(self, path: str) -> Iterator[Message]:
        """Ask for the files of a COPY or ADD, by the command's source alone, and yield what comes.

        The data of a piece of a packed stream comes as it is, its checksum verified.

        Raises:
            ServerLost: the server reported an error or broke off the stream.
        """
        request = pb.ResourceRequest(path=path)
        call = self._connected.resource(request, metadata=wire.GUEST)
        try:
            with self._stop.calling(call.cancel), _Patience(call.cancel, self._call_timeout) as patience:
                for message in patience.with_each(call):
                    yield _opened(message)
        except grpc.RpcError as error:
            self._stop.check()
            if patience.lost:
                message = f"the server sent nothing of {path!r} for {self._call_timeout:g} seconds"
                raise ServerLost(message) from error
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
            self._call(self._connected.success, pb.Empty(), _FAREWELL_SECONDS)
        except grpc.RpcError as error:
            raise ServerLost(f"the server did not take the success: {failure(error)}") from error

    def abort(self, error: GuestError) -> bool:
        """Report a failure; False when the server did not take it. Never raises: it is the last call."""
        text = error.message.encode("utf-8", "replace").decode()  # names of files need not be UTF-8
        request = pb.AbortRequest(error=text, step=error.step, exit_code=error.exit_code, reason=error.reason)
        try:
            self._connected.abort(request, timeout=_FAREWELL_SECONDS, metadata=wire.GUEST)
        except (grpc.RpcError, ValueError):
            return False
        return True

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        try:
            call = method.future(request, timeout=timeout, metadata=wire.GUEST)
        except ValueError as error:  # what gRPC says of a channel that this guest has closed, at its end
            self._stop.check()
            raise ServerLost("the connection to the server was closed") from error
        with self._stop.calling(call.cancel):
            try:
                return call.result()
            except grpc.FutureCancelledError as error:
                self._stop.check()
                raise ServerLost("the connection to the server was closed") from error


class _Calls:
    """The methods of the service on a channel to a server that shows, or descends from, a certificate."""

    def __init__(self, block: wire.BootstrapBlock, contact: Contact) -> None:
        # That is the server's own, which the guest has verified: gRPC's core takes an anchor that is no CA
        # for itself alone, so each connection has to show that very one.
        credentials = grpc.ssl_channel_credentials(
            root_certificates=contact.certificate,
            private_key=block.key.encode(),
            certificate_chain=block.cert.encode(),
        )
        self.channel = grpc.secure_channel(
            block.host_port, credentials, options=_options(block, contact.token)
        )
        empty = pb.Empty
        self.commands = self._unary("Commands", pb.CommandsResponse)
        self.ping = self._unary("Ping", pb.PingResponse)
        self.logs = {"stdout": self._unary("StdOut", empty), "stderr": self._unary("StdErr", empty)}
        self.abort = self._unary("Abort", empty)
        self.success = self._unary("Success", empty)
        self.resource: Any = self.channel.unary_stream(
            wire.method("Resource"),
            request_serializer=pb.ResourceRequest.SerializeToString,
        )

    def _unary(self, name: str, response: Any) -> Any:
        return self.channel.unary_unary(
            wire.method(name),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )


class _Patience:
    """Calls `give_up` when the next message of a stream takes longer than `seconds` to come.

    A stream has one limit for all of it in gRPC; this one begins anew with each message, and what the guest
    does with a message does not count.
    """

    def __init__(self, give_up: Callable[[], object], seconds: float) -> None:
        self._give_up = give_up
        self._seconds = seconds
        self._since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        self.lost = False

    def __enter__(self) -> _Patience:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def with_each(self, stream: Iterator[Any]) -> Iterator[Any]:
        """Yield what the stream yields."""
        while True:
            self._since = time.monotonic()
            message = next(stream, None)
            self._since = None
            if message is None:
                return
            yield message

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self.lost = True
                self._give_up()
                return


def _options(block: wire.BootstrapBlock, token: str) -> list[tuple[str, Any]]:
    # gRPC's core asks for the way through as if the server were a proxy in front of itself.
    connect = [
        ("grpc.http_connect_server", block.host_port),
        ("grpc.http_connect_headers", f"Proxy-Authorization:Bearer {token}"),
    ]
    return [
        *(connect if token else ()),
        ("grpc.ssl_target_name_override", block.server_name),
        ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
        # What comes ahead of what is read: the core would let it grow to hundreds of megabytes on a fast
        # connection, where the guest is what is slow.
        ("grpc.http2.lookahead_bytes", wire.MAX_MESSAGE_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        # Not min_reconnect_backoff_ms: the core also takes it for the time that a connection attempt,
        # TLS handshake included, may last.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
