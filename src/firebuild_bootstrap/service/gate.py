"""The public port: mutual TLS that can say who was refused and why.

gRPC's C core keeps the reason of a failed handshake and the certificate of the peer to itself. So this
gate ends the TLS of every connection, checks it, and passes what is left on to the gRPC server over a
second mutual TLS connection through a UNIX socket in a private directory. Nothing is ever in plain text
outside this process, and the gRPC server checks every call by itself again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from dataclasses import dataclass
from typing import Final, Protocol

from OpenSSL import SSL

from firebuild_bootstrap.listening import format_address
from firebuild_bootstrap.service.certificates import Pin
from firebuild_bootstrap.service.limits import Limits
from firebuild_bootstrap.service.relay import TlsStream, relay
from firebuild_bootstrap.service.reporting import Refusals
from firebuild_bootstrap.service.tls import (
    ALPN,
    Inspection,
    client_context,
    handshake_problem,
    server_context,
)
from firebuild_pki import TLSMaterial

logger: Final = logging.getLogger("firebuild.service")
_LINGER_SECONDS: Final = 5.0
_ACCEPT_PAUSE: Final = 0.1


class ConnectionObserver(Protocol):
    """Learns about the connections of the guest."""

    def connection_opened(self, peer: str, tls_version: str) -> None:
        """The guest is connected from `peer`; called before any of its bytes is passed on."""
        ...

    def connection_closed(self) -> None:
        """One of its connections has ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class GateCredentials:
    """The material of both ends; this host issued both."""

    server: TLSMaterial
    guest: TLSMaterial


class Gate:
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
        credentials: GateCredentials,
        *,
        backend: str,
        limits: Limits,
        refusals: Refusals,
        observer: ConnectionObserver,
    ) -> None:
        self._outer = server_context(credentials.server)
        self._inner = client_context(credentials.guest)
        self._guest_pin = Pin(credentials.guest.fingerprint_sha256)
        self._server_pin = Pin(credentials.server.fingerprint_sha256)
        self._backend = backend
        self._limits = limits
        self._refusals = refusals
        self._observer = observer
        self._connections: set[asyncio.Task[None]] = set()
        # Oldest first; a connection leaves it as soon as it has shown the guest's certificate.
        self._handshaking: dict[asyncio.Task[None], str] = {}
        self._guests = 0
        self._thread: threading.Thread | None = None

    def start(self, listener: socket.socket) -> str:
        """Accept from a listening socket, which the gate closes, and return its address as `host:port`."""
        listener.setblocking(False)
        address = format_address(listener.getsockname())
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(listener, ready)), name="firebuild-gate", daemon=True
        )
        self._thread.start()
        ready.wait()
        return address

    def close_port(self) -> None:
        """Accept no more connections; those that are open go on."""
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._end_accepting(), self._loop).result()

    def stop(self) -> None:
        """Close the port and every connection, and wait for the thread."""
        assert self._thread is not None  # noqa: S101 - whoever started it stops it, once
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    async def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._listener = listener
        self._begin_accepting()
        ready.set()
        await self._stopping.wait()
        await self._end_accepting()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _begin_accepting(self) -> None:
        # Not a task around `sock_accept`: cancelled at the wrong moment, that loses a socket.
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    async def _end_accepting(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            logger.warning("cannot accept a connection: %s", error)
            self._loop.remove_reader(self._listener)  # out of descriptors, most likely: let some go
            self._loop.call_later(_ACCEPT_PAUSE, self._begin_accepting)
            return
        sock.setblocking(False)
        peer = format_address(address)
        if len(self._handshaking) >= self._limits.max_handshakes:
            # Others must not be able to keep the guest out by holding connections open.
            oldest = next(iter(self._handshaking))
            oldest.cancel()
            self._refusals.refuse(self._handshaking.pop(oldest), "its TLS handshake gave way to newer ones")
        task = asyncio.create_task(self._serve(sock, peer))
        self._connections.add(task)
        self._handshaking[task] = peer
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda ended: self._handshaking.pop(ended, None))
        task.add_done_callback(lambda _: sock.close())

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        outer = TlsStream(sock, self._outer, Inspection(self._guest_pin), server_side=True)
        problem = await self._admit(outer)
        if not problem and self._guests >= self._limits.max_connections:
            problem = f"the guest has {self._limits.max_connections} connections open already"
        if problem:
            self._refusals.refuse(peer, problem, outer.inspection.certificate)
            return
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - `_accept` made it
        self._handshaking.pop(task, None)
        self._guests += 1
        try:
            await self._pass_on(outer, peer)
        except OSError as error:
            logger.warning("cannot pass %s on to the gRPC server: %s", peer, error)
        finally:
            self._guests -= 1

    async def _admit(self, outer: TlsStream) -> str:
        try:
            async with asyncio.timeout(self._limits.handshake_timeout):
                problem = await _handshake(outer)
        except TimeoutError:
            return f"its TLS handshake took longer than {self._limits.handshake_timeout:g} seconds"
        if not problem and outer.protocol != ALPN:
            return "it does not offer HTTP/2 (ALPN h2)"
        return problem

    async def _pass_on(self, outer: TlsStream, peer: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(sock):
            sock.setblocking(False)
            inner = TlsStream(sock, self._inner, Inspection(self._server_pin), server_side=False)
            async with asyncio.timeout(self._limits.handshake_timeout):
                await self._loop.sock_connect(sock, self._backend)
                problem = await _handshake(inner)
            if problem:
                raise ConnectionError(problem)
            self._observer.connection_opened(peer, outer.tls_version)
            try:
                await relay(outer, inner, linger=_LINGER_SECONDS)
            finally:
                self._observer.connection_closed()


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
