"""A TCP proxy that misbehaves on request: delays, says nothing, refuses, resets, cuts answers off."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from enum import Enum, auto
from itertools import cycle, islice
from types import TracebackType
from typing import Self

from firebuild_bootstrap.polling import readable

_TICK = 0.05


class Kind(Enum):
    """What happens to a request, or to its answer."""

    FORWARD = auto()
    DELAY = auto()
    """The request is passed on some seconds later."""
    SILENT = auto()
    """The request is swallowed."""
    CLOSE = auto()
    """The connection ends in good order, without an answer."""
    RESET = auto()
    """The connection ends with a TCP reset."""
    TRUNCATE = auto()
    """The connection ends after some bytes of the answer."""
    TRICKLE = auto()
    """After some bytes the rest of the answer comes byte by byte, some seconds apart."""
    ANSWER = auto()
    """The answer is another one."""
    REFUSE = auto()
    """New connections are refused, present ones end."""


@dataclass(frozen=True)
class Fault:
    """How the proxy behaves.

    Args:
        kind: what it does.
        seconds: for DELAY and TRICKLE.
        size: bytes of the answer that pass, for TRUNCATE and TRICKLE.
        times: for how many requests; then it forwards.
        answer: what comes in place of the answer, for ANSWER.
    """

    kind: Kind
    seconds: float = 0.0
    size: int = 0
    times: int = 1_000_000
    answer: bytes = b""


FORWARD = Fault(Kind.FORWARD)


class Proxy:
    """Listens on a port of its own; use it in a ``with`` block.

    Each connection goes to the next of the upstreams that accepts it, as with a simple load balancer.

    Args:
        upstreams: ports on loopback.
        tls: for its clients, and for the upstreams, where it is to see what is in their TLS.
    """

    def __init__(self, *upstreams: int, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None) -> None:
        self._upstreams: Sequence[int] = upstreams
        self._tls = tls
        self._turn = cycle(range(len(upstreams)))
        self._lock = threading.Lock()
        self._fault = FORWARD
        self._left = 0
        self._epoch = 0
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self.requests = 0
        """How many requests have come so far."""

    @property
    def address(self) -> str:
        """URL for the setting `address`."""
        return f"http://127.0.0.1:{self.port}"

    def behave(self, fault: Fault = FORWARD) -> None:
        """Behave like this from the next request on, also on open connections."""
        with self._lock:
            was, self._fault, self._left = self._fault, fault, fault.times
            if Kind.REFUSE in (was.kind, fault.kind):
                self._epoch += 1  # ends the open connections
                self._listen(fault.kind is not Kind.REFUSE)

    def __enter__(self) -> Self:
        self._listener.listen()
        self._start(threading.Thread(target=self._accept))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _start(self, thread: threading.Thread) -> None:
        self._threads.append(thread)
        thread.start()

    def _listen(self, listening: bool) -> None:
        # A port that is bound but not listened on refuses, and nobody else gets it.
        self._listener.close()
        self._listener = _bound(self.port)
        if listening:
            self._listener.listen()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                listener, listening = self._listener, self._fault.kind is not Kind.REFUSE
                ready = listening and readable(listener, seconds=0)
                client = listener.accept()[0] if ready else None
                epoch = self._epoch
            if client is None:
                self._stopping.wait(_TICK / 5)
                continue
            self._start(threading.Thread(target=self._serve, args=(client, epoch)))

    def _serve(self, client: socket.socket, epoch: int) -> None:
        fault = FORWARD
        with ExitStack() as stack:
            stack.enter_context(suppress(OSError))
            stack.enter_context(closing(client))
            if self._tls is not None:
                client = stack.enter_context(closing(self._tls[0].wrap_socket(client, server_side=True)))
            upstream = self._connect()
            if upstream is None:
                return
            stack.enter_context(closing(upstream))
            with suppress(OSError):
                while epoch == self._epoch and not self._stopping.is_set():
                    ready = readable(client, upstream, seconds=_TICK)
                    if client.fileno() in ready:
                        fault = self._taken()
                        if not self._request(client, upstream, fault):
                            return
                    elif upstream.fileno() in ready and not self._answer(client, upstream, fault):
                        return

    def _connect(self) -> socket.socket | None:
        with self._lock:
            first = next(self._turn)
        for port in islice(cycle(self._upstreams), first, first + len(self._upstreams)):
            with suppress(OSError):
                return self._connected(socket.create_connection(("127.0.0.1", port), timeout=5))
        return None

    def _connected(self, upstream: socket.socket) -> socket.socket:
        if self._tls is None:
            return upstream
        with upstream:  # closed if there is no handshake; else it is the other's
            return self._tls[1].wrap_socket(upstream)

    def _taken(self) -> Fault:
        with self._lock:
            self.requests += 1
            self._left -= 1
            return self._fault if self._left >= 0 else FORWARD

    def _request(self, client: socket.socket, upstream: socket.socket, fault: Fault) -> bool:
        data = client.recv(1 << 16)
        if fault.kind is Kind.RESET:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if not data or fault.kind in {Kind.CLOSE, Kind.RESET}:
            return False
        if fault.kind is Kind.DELAY:
            self._stopping.wait(fault.seconds)
        if fault.kind is not Kind.SILENT:
            upstream.sendall(data)
        return True

    def _answer(self, client: socket.socket, upstream: socket.socket, fault: Fault) -> bool:
        data = upstream.recv(1 << 16)
        if fault.kind is Kind.ANSWER:
            client.sendall(fault.answer)
            return False
        if fault.kind is Kind.TRUNCATE:
            client.sendall(data[: fault.size])
            return False
        if fault.kind is Kind.TRICKLE:
            client.sendall(data[: fault.size])
            return self._trickle(client, data[fault.size :], fault.seconds)
        client.sendall(data)
        return bool(data)

    def _trickle(self, client: socket.socket, data: bytes, seconds: float) -> bool:
        for byte in data:
            client.sendall(bytes([byte]))
            if self._stopping.wait(seconds):
                return False
        return True


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    return made
