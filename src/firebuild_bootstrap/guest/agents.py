"""The guest's side of RUN --mount=type=ssh: sockets that clients of a RUN take for that of an SSH agent.

Each request of a client is passed on to the host, whose reply it gets; keys never come here. A client's next
request is read when the last is answered, so that there is never more to keep than one message for each.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Final, Protocol

from firebuild_bootstrap import wire

from .errors import GuestError

Reply = Callable[[bytes], object]
_ACCEPT_PAUSE: Final = 0.1
"""Seconds until the next is accepted where one could not be."""


class Ask(Protocol):
    """Passes a request on."""

    def __call__(self, identifier: str, request: bytes, reply: Reply, /) -> None:
        """Ask the agent `identifier`, and have `reply` called with what it says, or never.

        Raises:
            GuestError: the host is lost.
        """


class AgentSockets:
    """Serves the ssh mounts of one RUN in threads of its own, until it is closed.

    Args:
        ask: asks the agents of the host.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._closed = False
        self._room = threading.Semaphore(wire.MAX_AGENT_REQUESTS)
        self._threads: list[threading.Thread] = []
        self._listeners: list[socket.socket] = []
        self._clients: dict[socket.socket, queue.SimpleQueue[bytes | None]] = {}

    def add(self, path: str, mount: wire.SshMount) -> None:
        """Make the socket of a mount.

        Args:
            path: where nothing is yet; no RUN sees its directory.
            mount: the mount.

        Raises:
            OSError: it can't be made.
        """
        listener = socket.socket(socket.AF_UNIX)
        self._listeners.append(listener)
        folder, name = os.path.split(path)
        directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor: the address of a socket has 107 bytes at most (unix(7)).
            listener.bind(f"/proc/self/fd/{directory}/{name}")
        finally:
            os.close(directory)
        os.chown(path, mount.uid, mount.gid)
        os.chmod(path, mount.mode)
        listener.listen()
        with self._lock:
            self._start(self._accept, listener, mount.id)

    def close(self) -> None:
        """End all connections, and wait for the threads."""
        with self._lock:
            self._closed = True
            for client, replies in self._clients.items():
                _shut_down(client)
                replies.put(None)
        for listener in self._listeners:
            _shut_down(listener)  # ends `accept`, which closing it would not
            self._room.release()
        while self._threads:
            self._threads.pop().join()
        for listener in self._listeners:
            listener.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="agent", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, identifier: str) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:  # closed; or who came has gone, or no descriptor is left for now (accept(2))
                if self._closed:
                    return
                time.sleep(_ACCEPT_PAUSE)
                continue
            self._room.acquire()
            replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            with self._lock:
                if self._closed:
                    client.close()
                    return
                self._clients[client] = replies
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                self._start(self._serve, client, identifier, replies)

    def _serve(
        self, client: socket.socket, identifier: str, replies: queue.SimpleQueue[bytes | None]
    ) -> None:
        with closing(client):
            with suppress(OSError, GuestError):
                while request := _read_message(client):
                    self._ask(identifier, request, replies.put)
                    if (reply := replies.get()) is None:
                        break
                    client.sendall(len(reply).to_bytes(4) + reply)
            with self._lock:
                del self._clients[client]
        self._room.release()


def _read_message(client: socket.socket) -> bytes:
    """Return the next message without its length; nothing where there is none, or one that is too long."""
    size = int.from_bytes(_read(client, 4))
    return _read(client, size) if size <= wire.MAX_AGENT_MESSAGE else b""


def _read(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (more := client.recv(size - len(data))):
            return b""
        data += more
    return data


def _shut_down(end: socket.socket) -> None:
    with suppress(OSError):  # the other end has gone
        end.shutdown(socket.SHUT_RDWR)
