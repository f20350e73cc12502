"""TLS over asyncio sockets with OpenSSL, and the relay between two such streams, or two bare sockets.

The standard library's ssl would be shorter, but it cannot tell whose certificate failed and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final

from OpenSSL import SSL

from firebuild_bootstrap.service.tls import Inspection

# One read of a socket; measured: smaller costs throughput, larger gains nothing.
_READ_BYTES: Final = 256 * 1024
# Enough for what a handshake brings, and little enough for many that lead nowhere.
_HANDSHAKE_BYTES: Final = 16 * 1024
_RECORD_BYTES: Final = 16 * 1024  # TLS never hands out more at once
# What is taken from a peer that takes nothing itself. HTTP/2 lets it send far less until it has read a
# WINDOW_UPDATE; but TLS would go on to make answers to its key updates, and keep them all.
_READ_AHEAD_BYTES: Final = 4 * 1024 * 1024


class TlsStream:
    """One TLS connection whose socket is driven by the running event loop.

    Args:
        sock: connected and non-blocking; closing it is left to the caller.
        context: for the role that it plays.
        inspection: receives what the verification of the peer finds.
        server_side: whether it is the server of this connection.
    """

    def __init__(
        self, sock: socket.socket, context: SSL.Context, inspection: Inspection, *, server_side: bool
    ) -> None:
        self.inspection = inspection
        self.first_bytes = b""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._connection = SSL.Connection(context, None)
        self._connection.set_app_data(inspection)
        if server_side:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._buffer = memoryview(bytearray(_HANDSHAKE_BYTES))
        self._flushing = asyncio.Lock()
        self._read_ahead = 0

    @property
    def tls_version(self) -> str:
        """The negotiated version, for example `TLSv1.3`."""
        return self._connection.get_protocol_version_name()

    @property
    def group(self) -> str:
        """The negotiated group of the key exchange, by its name in OpenSSL."""
        return self._connection.get_group_name() or ""

    @property
    def protocol(self) -> bytes:
        """The negotiated application protocol (ALPN), empty where there is none."""
        return self._connection.get_alpn_proto_negotiated()

    def received(self, data: bytes) -> None:
        """Take the first bytes of the peer, which were read from the socket before; none at its end."""
        if data:
            self.first_bytes = data[:16]
            self._connection.bio_write(data)

    async def handshake(self) -> None:
        """Complete the handshake.

        Raises:
            SSL.Error: it failed; the peer has been sent the alert.
            EOFError: the peer closed the connection before the end.
            OSError: the connection broke.
        """
        while True:
            try:
                self._connection.do_handshake()
            except SSL.WantReadError:
                await self._flush()
                if not await self._fill():
                    raise EOFError from None
            except SSL.Error:
                await self._flush()
                raise
            else:
                await self._flush()
                self._buffer = memoryview(bytearray(_READ_BYTES))
                return

    async def read(self) -> bytes:
        """Return all decrypted bytes that are at hand, waiting for at least one; empty at the end.

        Raises:
            SSL.Error: the peer broke the TLS protocol.
            OSError: the connection broke.
        """
        while True:
            data = self._decrypted()
            if data is not None:
                return data
            if not await self._fill():
                return b""
            if not self._flushing.locked() or self._read_ahead > _READ_AHEAD_BYTES:
                await self._flush()  # what TLS itself answers, for example to a key update

    async def write(self, data: bytes) -> None:
        """Encrypt and send; returns when the kernel has taken everything, so a slow peer slows the sender.

        Raises:
            SSL.Error: the connection is closed already.
            OSError: the connection broke.
        """
        self._connection.sendall(data)
        await self._flush()

    async def close_write(self) -> None:
        """Tell the peer that nothing more will come; reading goes on."""
        with contextlib.suppress(SSL.Error, OSError):
            self._connection.shutdown()
            await self._flush()
            self._sock.shutdown(socket.SHUT_WR)

    def _decrypted(self) -> bytes | None:
        pieces: list[bytes] = []
        try:
            while True:
                pieces.append(self._connection.recv(_RECORD_BYTES))
        except SSL.WantReadError:
            return b"".join(pieces) if pieces else None
        except SSL.ZeroReturnError:
            return b"".join(pieces)

    async def _fill(self) -> int:
        received = await self._loop.sock_recv_into(self._sock, self._buffer)
        if received:
            if not self.first_bytes:
                self.first_bytes = bytes(self._buffer[: min(received, 16)])
            self._connection.bio_write(self._buffer[:received])
            self._read_ahead += received
        return received

    async def _flush(self) -> None:
        async with self._flushing:
            while True:
                try:
                    data = self._connection.bio_read(_READ_BYTES * 2)
                except SSL.WantReadError:
                    return
                await self._loop.sock_sendall(self._sock, data)
                self._read_ahead = 0


async def relay(left: TlsStream, right: TlsStream, *, linger: float) -> None:
    """Pass bytes both ways until both ends are done.

    When one direction ends its receiver is told so, and the other has `linger` seconds to end, too.
    A broken connection ends both at once. Neither stream is closed.
    """
    pumps = {asyncio.create_task(_pump(left, right)), asyncio.create_task(_pump(right, left))}
    try:
        ended, running = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        if running and not any(pump.exception() for pump in ended):
            await asyncio.wait(running, timeout=linger)
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(source: TlsStream, target: TlsStream) -> None:
    while data := await source.read():
        await target.write(data)
    await target.close_write()


async def relay_sockets(
    left: socket.socket, right: socket.socket, *, linger: float, answered: Callable[[bytes], None]
) -> None:
    """Pass the bytes of two sockets both ways as `relay` does; both are shut down at the end.

    `answered` is called, in a thread, with the first bytes of the right one before they are passed on.

    Two threads do it: the calls and callbacks of the event loop take more time than the copying.
    """
    loop = asyncio.get_running_loop()
    ended: list[asyncio.Future[None]] = []
    threads = []
    for source, target, look in ((left, right, None), (right, left, answered)):
        source.setblocking(True)
        future = loop.create_future()
        arguments = (source, target, loop, future, look)
        threads.append(threading.Thread(target=_pump_sockets, args=arguments, daemon=True))
        ended.append(future)
    try:
        for thread in threads:
            thread.start()
        _, running = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        if running:
            await asyncio.wait(running, timeout=linger)
    finally:
        for sock in (left, right):
            _shut_down(sock, socket.SHUT_RDWR)  # this wakes whatever waits for one of them
        for thread in threads:
            thread.join()


def _pump_sockets(
    source: socket.socket,
    target: socket.socket,
    loop: asyncio.AbstractEventLoop,
    ended: asyncio.Future[None],
    look: Callable[[bytes], None] | None,
) -> None:
    # Not splice(2): what it passes on page by page costs TCP more than two copies within a core's cache do.
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        while received := source.recv_into(buffer):
            if look is not None:
                look(bytes(buffer[:received]))
                look = None
            target.sendall(buffer[:received])
        _shut_down(target, socket.SHUT_WR)
    except OSError:
        _shut_down(source, socket.SHUT_RDWR)  # the other direction ends, too
        _shut_down(target, socket.SHUT_RDWR)
    loop.call_soon_threadsafe(_tell, ended)


def _tell(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _shut_down(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)
