"""Ports of this host that lead to a machine whose network namespace has no way in.

A socket belongs to the namespace in which it was made, whoever connects it. So the process that holds the
machine's namespace makes some and hands them out (holder.py), and this one connects them, in there, to ports
that QEMU forwards to the guest. There is no way in the other direction.
"""

from __future__ import annotations

import ctypes
import queue
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from firebuild_bootstrap.listening import unusable_address
from firebuild_bootstrap.machine.base import PublishedPort
from firebuild_bootstrap.machine.qemu.command import GUEST

SOCKETS: Final = 64
"""Connections at once; further ones wait."""
_FIRST_INNER: Final = 20000  # in a namespace of our own, below the ports that the kernel picks
_GUEST: Final = GUEST.partition("/")[0]  # by default QEMU forwards to what its DHCP gives out first
_PIECE: Final = 64 * 1024
_PAUSE: Final = 0.05


class Publisher:
    """Listens on this host, and relays what comes.

    Args:
        ports: what leads where.

    Raises:
        InputError: this host does not let us listen there.
    """

    def __init__(self, ports: Sequence[PublishedPort]) -> None:
        self._listeners: list[tuple[socket.socket, int]] = []
        self._connections: set[socket.socket] = set()
        self._free: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # once closed, nothing is given back or begun
        self.forwards = tuple(
            f"tcp:127.0.0.1:{_FIRST_INNER + number}-{_GUEST}:{port.guest}"
            for number, port in enumerate(ports)
        )
        """What QEMU has to forward, as its `hostfwd`."""
        for number, port in enumerate(ports):
            try:
                listener = socket.create_server((port.address, port.host), backlog=64)
            except (OSError, OverflowError) as error:
                self.close()
                raise unusable_address(
                    f"--publish: {port.address}:{port.host} can't be listened on",
                    error,
                    port.host,
                    "--publish",
                ) from error
            self._listeners.append((listener, _FIRST_INNER + number))

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Relay from now on.

        Args:
            sockets: of the machine's namespace, not connected; they are closed here.
        """
        for one in sockets:
            self._free.put(one)
        for listener, inner in self._listeners:
            threading.Thread(target=self._accept, args=(listener, inner), name="publish", daemon=True).start()

    def close(self) -> None:
        """End all connections. Idempotent."""
        with self._lock:
            self._closed = True
            for listener, _ in self._listeners:
                with suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
                listener.close()
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            with suppress(queue.Empty):
                while (one := self._free.get_nowait()) is not None:
                    one.close()
            self._free.put(None)  # for each who still waits

    def _accept(self, listener: socket.socket, inner: int) -> None:
        while not self._closed:
            try:
                outside, _ = listener.accept()
            except OSError:  # closed; or who came has gone, or no descriptor is left for now (accept(2))
                time.sleep(_PAUSE)
                continue
            inside = self._free.get()
            if inside is None:
                self._free.put(None)
                outside.close()
                return
            work = (outside, inside, inner)
            threading.Thread(target=self._relay, args=work, name="published", daemon=True).start()

    def _relay(self, outside: socket.socket, inside: socket.socket, inner: int) -> None:
        with self._lock:
            if self._closed:
                outside.close()
                inside.close()
                return
            self._connections |= {outside, inside}
        with suppress(OSError), outside:
            inside.connect(("127.0.0.1", inner))
            back = threading.Thread(target=_copy, args=(inside, outside), name="published", daemon=True)
            back.start()
            _copy(outside, inside)
            back.join()
        with self._lock:
            self._connections -= {outside, inside}
            if self._closed or not _disconnected(inside):
                inside.close()
            else:
                self._free.put(inside)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until its end, and then that; a broken connection ends the other one as well."""
    try:
        while data := source.recv(_PIECE):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _disconnected(one: socket.socket) -> bool:
    """Make a socket as good as new (connect(2), AF_UNSPEC), because nobody can make one more in there."""
    address = ctypes.create_string_buffer(16)
    return bool(ctypes.CDLL(None).connect(one.fileno(), address, 16) == 0)
