"""Accepting connections in an event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

_ACCEPT_PAUSE: Final = 0.1


class Acceptor:
    """Accepts connections in the running event loop, and closes the socket in the end.

    Where none can be accepted, most likely because no descriptor is left, it waits a moment (accept(2)): the
    socket stays readable, and would keep the loop busy.

    Args:
        listener: does not block.
        take: gets each connection, and the address of its peer.
        refused: gets the error where none could be accepted.
    """

    def __init__(
        self,
        listener: socket.socket,
        take: Callable[[socket.socket, tuple[object, ...]], None],
        refused: Callable[[OSError], None] = lambda _: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._take = take
        self._refused = refused
        self._begin()

    def close(self) -> None:
        """Accept no more connections; those that are open go on. Idempotent."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _begin(self) -> None:
        # Not a task around `sock_accept`: cancelled at the wrong moment, that loses a socket.
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            self._refused(error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_ACCEPT_PAUSE, self._begin)
            return
        sock.setblocking(False)
        self._take(sock, address)
