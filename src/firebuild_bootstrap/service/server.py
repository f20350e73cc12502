"""The bootstrap server of one build: a gRPC server behind its proxy, and the watch over the guest."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import grpc

from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import MAKE_ROOM, FirebuildError, MachineError
from firebuild_bootstrap.events import EventSink, StepInfo
from firebuild_bootstrap.image.layertrees import LayerSink
from firebuild_bootstrap.listening import listen
from firebuild_bootstrap.service.console import Console, FailureShell
from firebuild_bootstrap.service.limits import Limits
from firebuild_bootstrap.service.proxy import Proxy, ProxyCredentials
from firebuild_bootstrap.service.reporting import Outcome
from firebuild_bootstrap.service.session import BuildEnded, Session, StepEvents
from firebuild_bootstrap.service.stream import NoLayers, Stream
from firebuild_bootstrap.service.tls import PeerCertificate, Pin
from firebuild_bootstrap.wire import CHUNK_BYTES, AnyCommand, CopyCommand, mount_resources
from firebuild_pki import TLSMaterial
from firebuild_pki.grpc_credentials import server_credentials

if TYPE_CHECKING:
    from firebuild_bootstrap.legacy.handlers import Handlers
    from firebuild_bootstrap.sshagent import SshAgent

    _Context = grpc.ServicerContext
    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic for type checkers only

# What a guest can make the server keep is bounded (docs/wire-protocol.md): each worker holds one message, and
# a call that waits for a worker what HTTP/2 lets through before anybody reads. Our guest opens four at most.
_WORKERS: Final = 8
_STOP_SECONDS: Final = 10.0
_CALLS_PER_CONNECTION: Final = 16
_MOST_CALLS: Final = 128  # given up ones count until a worker has looked at them
_UNREAD_BYTES: Final = 128 * 1024  # a whole batch of output: half of that costs half of the throughput


class BootstrapServer:
    """Serves one build to one guest over mutual TLS, from `start` to `stop`.

    Args:
        commands: what to do, in order.
        resources: by the `source` of the COPY or ADD command that asks for them.
        server_material: what the server presents.
        guest_material: what was issued to the guest; no other certificate may call.
        events: receives events, one at a time, from threads of the server.
        steps: number, line and text of each step, for the events; by default those of the commands. A guest
            that reports of another one ends the build.
        total_steps: for the events; the highest number in `steps` unless given.
        stage: for the events, where a build has several.
        limits: times and sizes.
        on_guest_connected: called once, before the guest's first call is answered. An error ends the build.
        layers: takes the layers of finished steps.
        agents: SSH agents of the user by id; a RUN reaches those that it mounts.
        console: what the user says to a command with `attach`; there is one, and it is the last.
        shell: where a user gets a shell when a RUN with `pauses` has failed.
        runtime_directory: where to make the private directory of the inner socket.
    """

    def __init__(
        self,
        *,
        commands: Sequence[AnyCommand],
        resources: Mapping[str, Resource],
        server_material: TLSMaterial,
        guest_material: TLSMaterial,
        events: EventSink,
        steps: Sequence[StepInfo] = (),
        total_steps: int | None = None,
        stage: str = "",
        limits: Limits | None = None,
        on_guest_connected: Callable[[], None] = lambda: None,
        layers: LayerSink | None = None,
        agents: Mapping[str, SshAgent] = MappingProxyType({}),
        console: Console | None = None,
        shell: FailureShell | None = None,
        runtime_directory: Path | None = None,
    ) -> None:
        _check_resources(commands, resources)
        self._limits = limits or Limits()
        self._credentials = ProxyCredentials(server=server_material, guest=guest_material)
        self._runtime_directory = runtime_directory
        self._session = Session(events=events, limits=self._limits, on_guest_connected=on_guest_connected)
        steps = steps or [StepInfo(command.step, 0, command.original) for command in commands]
        total = max((step.number for step in steps), default=0) if total_steps is None else total_steps
        told = StepEvents(self._session, steps, total, stage)
        self._stream = Stream(
            self._session,
            commands=commands,
            resources=resources,
            steps=told,
            layers=layers or NoLayers(),
            agents=agents,
            console=console,
            shell=shell,
        )
        self._old_calls = _OldCalls(
            lambda handlers: handlers(self._session, commands=commands, resources=resources, steps=told)
        )
        self._closing = contextlib.ExitStack()
        self._running: tuple[Proxy, grpc.Server] | None = None
        self._stopping = threading.Lock()
        self._started = False

    @property
    def refused_peers(self) -> int:
        """How many peers were turned away so far."""
        return self._session.refusals.count

    @property
    def has_guest(self) -> bool:
        """Whether the guest has called."""
        return self._session.has_guest

    def start(self, listener: socket.socket | None = None) -> str:
        """Begin to serve; a server serves one build, and is started once.

        Args:
            listener: a listening socket, in whatever network the guest can reach; None for a free port on
                this host's loopback interface.

        Returns:
            `host:port` of the public port.

        Raises:
            FirebuildError: the address or the material cannot be used.
            RuntimeError: it was started before.
        """
        if self._started:
            raise RuntimeError("a bootstrap server serves one build, and is started once")
        self._started = True
        with contextlib.ExitStack() as started:
            started.callback(self._old_calls.close)
            server, backend = self._start_grpc(started)
            proxy = Proxy(
                self._credentials,
                backend=backend,
                limits=self._limits,
                refusals=self._session.refusals,
                observer=self._session,
            )
            host_port = proxy.start(listener or listen("127.0.0.1"))
            started.callback(proxy.stop)
            self._session.start()
            self._running = (proxy, server)
            self._closing = started.pop_all()
        return host_port

    def await_guest(self) -> None:
        """Give the guest the whole initial timeout from now on, for example when its machine has started."""
        self._session.await_guest()

    def wait(self, timeout: float | None = None) -> Outcome | None:
        """Wait for the end of the build.

        Args:
            timeout: seconds, None for as long as it takes.

        Returns:
            How it ended, or None if it did not within `timeout` or the server was stopped before.
        """
        return self._session.wait(timeout)

    def stop(self, grace: float = 2.0) -> None:
        """Close the port, let calls end for up to `grace` seconds, and wait for every thread.

        Harmless when repeated, not started, or called by several threads at once.
        """
        self._session.stop()
        with self._stopping:
            if self._running is not None:
                proxy, server = self._running
                self._running = None
                proxy.close_port()
                # gRPC's thread ends where it can't start another one: then it never says that it stopped.
                server.stop(grace).wait(grace + _STOP_SECONDS)
            self._closing.close()

    def __enter__(self) -> Self:
        """Return the server; `start` is left to the caller, who wants its result."""
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_grpc(self, started: contextlib.ExitStack) -> tuple[grpc.Server, str]:
        try:
            directory = tempfile.mkdtemp(prefix="firebuild-", dir=self._runtime_directory)  # mode 0700
        except OSError as error:
            where = self._runtime_directory or tempfile.gettempdir()
            raise MachineError(
                f"{where}: no directory can be made: {error.strerror}", hint=MAKE_ROOM
            ) from error
        started.callback(shutil.rmtree, directory, ignore_errors=True)
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        started.callback(os.close, descriptor)
        pool = started.enter_context(ThreadPoolExecutor(_WORKERS, thread_name_prefix="firebuild-call"))
        server = grpc.server(
            pool,
            interceptors=[Guard(Pin(self._credentials.guest.fingerprint_sha256), self._session)],
            options=[
                ("grpc.max_receive_message_length", self._limits.max_message_bytes),
                ("grpc.max_send_message_length", self._limits.max_message_bytes),
                # A guest waits with its next call then, as HTTP/2 tells it (RFC 9113, section 5.1.2).
                ("grpc.max_concurrent_streams", _CALLS_PER_CONNECTION),
                ("grpc.http2.lookahead_bytes", _UNREAD_BYTES),
                # A piece of files goes to TLS at once; by default it goes in sixteen parts.
                ("grpc.http2.write_buffer_size", CHUNK_BYTES),
                # Who is passed through shakes hands here (proxy.py).
                ("grpc.server_handshake_timeout_ms", round(self._limits.handshake_timeout * 1000)),
                # A guest asks for signs of life, as often as it wants; HTTP/2 bounds the answers that wait.
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.http2.bdp_probe", 0),  # would raise the line before by what the guest sends
            ],
            maximum_concurrent_rpcs=_MOST_CALLS,
        )
        server.add_generic_rpc_handlers((self._stream.generic_handler(), self._old_calls))
        # A socket's address holds 107 bytes at most, whatever the length of the directory's path.
        backend = f"/proc/self/fd/{descriptor}/grpc"
        try:
            server.add_secure_port(f"unix:{backend}", server_credentials(self._credentials.server))
        except RuntimeError as error:  # gRPC does not say why
            _bind(directory, backend)
            raise FirebuildError(f"the bootstrap server cannot use its TLS material: {error}") from error
        server.start()
        started.callback(lambda: server.stop(None).wait(_STOP_SECONDS))
        return server, backend


def _bind(directory: str, address: str) -> None:
    """Make a socket, to learn why gRPC could not.

    Raises:
        MachineError: the directory takes none; the message says why.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(address)
        except OSError as error:
            raise MachineError(
                f"{directory}: no socket can be made: {error.strerror}", hint=MAKE_ROOM
            ) from error


def _check_resources(commands: Sequence[AnyCommand], resources: Mapping[str, Resource]) -> None:
    wanted = {name for command in commands for name in mount_resources(command)}
    wanted |= {command.source for command in commands if isinstance(command, CopyCommand)}
    if missing := sorted(wanted ^ resources.keys()):
        raise ValueError(f"commands and resources do not fit together: {', '.join(missing)}")


class _OldCalls(grpc.GenericRpcHandler):
    """The calls of guests that know no session. What they take is imported for the first of them."""

    def __init__(self, make: Callable[[type[Handlers]], Handlers]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._handlers: Handlers | None = None
        self._methods: grpc.GenericRpcHandler | None = None

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what answers a call, None where it is none of theirs."""
        with self._lock:
            if self._methods is None:
                from firebuild_bootstrap.legacy.handlers import Handlers

                self._handlers = self._make(Handlers)
                self._methods = self._handlers.generic_handler()
        return self._methods.service(details)

    def close(self) -> None:
        """Let go of what they have open."""
        with self._lock:
            if self._handlers is not None:
                self._handlers.close()


# --- what stands before every handler: the pinned certificate, the build's state, errors ----------

_MAX_DETAILS: Final = 1024


class Guard(grpc.ServerInterceptor):
    """Lets calls of one client certificate through, for as long as the build runs.

    Args:
        pin: the certificate that was issued to this build's guest.
        session: the build; an error of a handler ends it.
    """

    def __init__(self, pin: Pin, session: Session) -> None:
        self._pin = pin
        self._session = session

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Wrap the handler, also of a method that does not exist: refused peers learn nothing from that."""
        handler = continuation(handler_call_details)
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._unknown_method)
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._guard_stream(handler.stream_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._guard_stream(handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            self._guard_unary(handler.unary_unary),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _guard_unary(self, behaviour: Any) -> Callable[[Any, _Context], Any]:
        def call(request: Any, context: _Context) -> Any:
            self._admit(context)
            try:
                return behaviour(request, context)
            except Exception as error:
                self._fail(context, error)

        return call

    def _guard_stream(self, behaviour: Any) -> Callable[[Any, _Context], Iterator[Any]]:
        def call(request: Any, context: _Context) -> Iterator[Any]:
            self._admit(context)
            try:
                yield from behaviour(request, context)
            except Exception as error:
                self._fail(context, error)

        return call

    def _unknown_method(self, _: bytes, context: _Context) -> NoReturn:
        self._admit(context)
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method")

    def _admit(self, context: _Context) -> None:
        certificate = _peer_certificate(context)
        if not self._pin.matches(certificate):
            self._session.refuse(context.peer(), certificate)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this build was not made for you")
        try:
            self._session.enter(context.peer())
        except BuildEnded:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")

    def _fail(self, context: _Context, error: Exception) -> NoReturn:
        if isinstance(error, BuildEnded):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the build has ended")
        if not isinstance(error, FirebuildError):
            unexpected = FirebuildError(f"the bootstrap server failed: {error!r:.200}")
            unexpected.__cause__ = error
            error = unexpected
        self._session.fail(error)
        context.abort(grpc.StatusCode.ABORTED, error.message[:_MAX_DETAILS])


def _peer_certificate(context: _Context) -> PeerCertificate:
    pems: Any = context.auth_context()["x509_pem_cert"]  # a list, whatever the stubs say
    return PeerCertificate.of(ssl.PEM_cert_to_DER_cert(pems[0].decode("ascii")))
