"""The public port: mutual TLS that can say who was refused and why.

gRPC's C core keeps the reason of a failed handshake and the certificate of the peer to itself. So this
proxy ends the TLS of every first connection and checks it. A guest that speaks `wire.CONTACT_PROTOCOL` is
then told a token. With it, its next connections ask for the way through (HTTP's CONNECT) and are passed on
to the gRPC server byte for byte: the mutual TLS in them is the gRPC server's own. Other guests go on over a
second mutual TLS connection. Nothing is ever in plain text outside this process, and the gRPC server checks
every connection and every call by itself again: a token that was overheard leads to a TLS handshake, and no
further.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import threading
from enum import Enum, auto
from typing import Final, Protocol

from OpenSSL import SSL

from firebuild_bootstrap import wire
from firebuild_bootstrap.accepting import Acceptor
from firebuild_bootstrap.errors import FirebuildError, MachineError, as_user_error
from firebuild_bootstrap.listening import format_address
from firebuild_bootstrap.service.limits import Limits
from firebuild_bootstrap.service.relay import TlsStream, relay, relay_sockets
from firebuild_bootstrap.service.reporting import Refusals
from firebuild_bootstrap.service.tls import (
    ALPN,
    CONTACT,
    Inspection,
    Pin,
    agreed_group,
    client_context,
    handshake_problem,
    server_context,
)
from firebuild_pki import TLSMaterial, parse_certificates, signed_with
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

logger: Final = logging.getLogger("firebuild.service")
_LINGER_SECONDS: Final = 5.0
# Bytes of a first read: a ClientHello, or what comes in place of one.
_FIRST_BYTES: Final = 16 * 1024
_MAX_CONNECT: Final = 2048
_WELCOME: Final = b"HTTP/1.1 200 OK\r\n\r\n"
_NO_TLS: Final = "it does not speak TLS but something else"


class ConnectionObserver(Protocol):
    """Learns about the connections of the guest."""

    def connection_opened(self, name: str, peer: str, tls_version: str) -> None:
        """The guest is connected from `peer`; called before any of its bytes is passed on.

        The gRPC server calls the peer of this connection `name`.
        """
        ...

    def keys_agreed(self, name: str, group: str) -> None:
        """The key exchange of a connection took place in this group; called before any call comes over it."""
        ...

    def connection_closed(self, name: str) -> bool:
        """One of its connections has ended; say whether a call has come over it."""
        ...

    def fail(self, error: FirebuildError) -> None:
        """No connection can be served any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class ProxyCredentials:
    """The material of both ends; this host issued both."""

    server: TLSMaterial
    guest: TLSMaterial


class Proxy:
    """Accepts connections in a thread of its own until it is stopped.

    Args:
        credentials: material of the server and of the one guest that may pass.
        backend: path of the gRPC server's UNIX socket.
        limits: handshake time and number of connections.
        refusals: told about every peer that is turned away.
        observer: told about the guest's connections.
    """

    def __init__(
        self,
        credentials: ProxyCredentials,
        *,
        backend: str,
        limits: Limits,
        refusals: Refusals,
        observer: ConnectionObserver,
    ) -> None:
        self._outer = server_context(credentials.server)
        self._inner = client_context(credentials.guest)
        self._too_new = _beyond_old_guests(credentials.server)
        self._guest_pin = Pin(credentials.guest.fingerprint_sha256)
        self._server_pin = Pin(credentials.server.fingerprint_sha256)
        self._backend = backend
        self._limits = limits
        self._refusals = refusals
        self._observer = observer
        self._token = secrets.token_hex(wire.TOKEN_BYTES).encode()
        self._contact_version = ""  # of TLS
        self._connections: set[asyncio.Task[None]] = set()
        # Oldest first; a connection leaves it as soon as it has shown the guest's certificate.
        self._handshaking: dict[asyncio.Task[None], str] = {}
        self._guests = 0
        self._thread: threading.Thread | None = None

    def start(self, listener: socket.socket) -> str:
        """Accept from a listening socket, which the proxy closes, and return its address as `host:port`."""
        listener.setblocking(False)
        address = format_address(listener.getsockname())
        ready = threading.Event()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._run(listener, ready)), name="firebuild-proxy", daemon=True
        )
        thread.start()
        self._thread = thread  # once it runs: `stop` waits for it
        ready.wait()
        return address

    def close_port(self) -> None:
        """Accept no more connections; those that are open go on."""
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._end_accepting(), self._loop).result()

    def stop(self) -> None:
        """Close the port and every connection, and wait for the thread; harmless when not started."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    async def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._acceptor = Acceptor(
            listener, self._accept, lambda error: logger.warning("cannot accept a connection: %s", error)
        )
        ready.set()
        await self._stopping.wait()
        self._acceptor.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _end_accepting(self) -> None:
        self._acceptor.close()

    def _accept(self, sock: socket.socket, address: tuple[object, ...]) -> None:
        peer = format_address(address)
        if len(self._handshaking) >= self._limits.max_handshakes:
            # Others must not be able to keep the guest out by holding connections open.
            oldest = next(iter(self._handshaking))
            oldest.cancel()
            self._refusals.refuse(self._handshaking.pop(oldest), "its TLS handshake gave way to newer ones")
        task = asyncio.create_task(self._serve(sock, peer))
        self._connections.add(task)
        self._handshaking[task] = peer
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: sock.close())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        self._handshaking.pop(task, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(shown := as_user_error(error), MachineError):  # no memory: the guest would try for long
            self._observer.fail(shown)
        else:  # no peer may be able to end a build by a mistake of ours
            logger.error("a connection was lost: %r", error)

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = TlsStream(sock, self._outer, Inspection(self._guest_pin), server_side=True)
        route = _Route.NONE
        try:
            async with asyncio.timeout(self._limits.handshake_timeout):
                route, problem = await self._admit(sock, tls)
        except TimeoutError:
            problem = (
                f"its TLS handshake took longer than {counted(self._limits.handshake_timeout, 'second')}"
            )
        if route in (_Route.RELAYED, _Route.PASSED) and self._guests >= self._limits.max_connections:
            problem = f"the guest has {counted(self._limits.max_connections, 'connection')} open already"
        if problem:
            self._refusals.refuse(peer, problem, tls.inspection.certificate)
            return
        if route is _Route.CONTACT:
            await self._tell_token(tls)
            return
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - `_accept` made it
        self._handshaking.pop(task, None)
        self._guests += 1
        try:
            await self._pass_on(sock, None if route is _Route.PASSED else tls, peer)
        except OSError as error:
            logger.warning("cannot pass %s on to the gRPC server: %s", peer, error)
        finally:
            self._guests -= 1

    async def _admit(self, sock: socket.socket, tls: TlsStream) -> tuple[_Route, str]:
        """Find out what a new connection is, and why it must not go on."""
        try:
            first = await self._loop.sock_recv(sock, _FIRST_BYTES)
            if first[:1] == b"C":  # no TLS record begins so
                problem = await self._connect_problem(sock, first)
                return (_Route.NONE if problem else _Route.PASSED), problem
        except OSError:
            first = b""
        tls.received(first)
        problem = await _handshake(tls)
        if problem and self._too_new and not tls.inspection.certificate.fingerprint:
            problem += f"; {self._too_new}"
        if not problem and tls.protocol not in (ALPN, CONTACT):
            problem = "it does not offer HTTP/2 (ALPN h2)"
        if problem:
            return _Route.NONE, problem
        return (_Route.CONTACT if tls.protocol == CONTACT else _Route.RELAYED), ""

    async def _connect_problem(self, sock: socket.socket, head: bytes) -> str:
        """Read the request of CONNECT (RFC 9110, section 9.3.6), which gRPC's clients send to a proxy."""
        while not head.endswith(b"\r\n\r\n"):
            if len(head) > _MAX_CONNECT or not (more := await self._loop.sock_recv(sock, _MAX_CONNECT)):
                return _NO_TLS
            head += more
        request, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
        if not request.startswith(b"CONNECT "):
            return _NO_TLS
        named = (
            (name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in fields)
        )
        given = dict(named).get(b"proxy-authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._token):
            return "it asks to be passed through without the token that the guest was given"
        return ""

    async def _tell_token(self, tls: TlsStream) -> None:
        self._contact_version = tls.tls_version
        with contextlib.suppress(SSL.Error, OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                await tls.write(self._token)
                await tls.close_write()
                await tls.read()  # until the guest has closed: what is unread then would reset the connection

    async def _pass_on(self, sock: socket.socket, tls: TlsStream | None, peer: str) -> None:
        """Connect a peer with the gRPC server, through our TLS or, without that, through its own only."""
        backend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(backend):
            backend.setblocking(False)
            backend.bind("")  # the kernel finds a free name (unix(7)), by which gRPC calls this connection
            name = f"unix-abstract:{backend.getsockname()[1:].decode('ascii')}"
            async with asyncio.timeout(self._limits.handshake_timeout):
                await self._loop.sock_connect(backend, self._backend)
                inner = None if tls is None else await self._inner_end(backend)
            self._observer.connection_opened(
                name, peer, self._contact_version if tls is None else tls.tls_version
            )
            try:
                if tls is None or inner is None:
                    await self._loop.sock_sendall(sock, _WELCOME)
                    await relay_sockets(
                        sock,
                        backend,
                        linger=_LINGER_SECONDS,
                        answered=lambda first: self._observer.keys_agreed(name, agreed_group(first)),
                    )
                else:
                    self._observer.keys_agreed(name, tls.group)
                    await relay(tls, inner, linger=_LINGER_SECONDS)
            finally:
                called = self._observer.connection_closed(name)
            if not called and tls is None:
                self._refusals.refuse(peer, "it came with the guest's token and made no call that is allowed")

    async def _inner_end(self, backend: socket.socket) -> TlsStream:
        inner = TlsStream(backend, self._inner, Inspection(self._server_pin), server_side=False)
        if problem := await _handshake(inner):
            raise ConnectionError(problem)
        return inner


def _beyond_old_guests(server: TLSMaterial) -> str:
    """Say what a guest that refuses the server may not know of its certificates; empty if it knows all."""
    names = dict.fromkeys(
        signed_with(one) for one in parse_certificates(server.certificate_chain_pem, "certificate chain")
    )
    new = [name for name in names if name.startswith("ML-DSA")]
    return f"{', '.join(new)} signatures are unknown to guests in Go and to gRPC before 1.85" if new else ""


class _Route(Enum):
    """What becomes of a connection that may go on."""

    NONE = auto()
    CONTACT = auto()
    RELAYED = auto()
    PASSED = auto()


async def _handshake(stream: TlsStream) -> str:
    try:
        await stream.handshake()
    except SSL.Error as error:
        return handshake_problem(error, stream.inspection, stream.first_bytes)
    except (EOFError, OSError):
        if not stream.first_bytes:
            return "it closed the connection without a TLS handshake"
        return "it closed the connection during the TLS handshake; perhaps it does not trust this server"
    return stream.inspection.problem
