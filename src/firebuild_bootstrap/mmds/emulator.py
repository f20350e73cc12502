"""A metadata service for machines that bring none: HTTP on a private UNIX socket or a local address."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from firebuild_bootstrap.accepting import Acceptor
from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.mmds.protocol import (
    BadRequest,
    MetadataService,
    MmdsVersion,
    Response,
    parse_request,
)
from firebuild_bootstrap.mmds.store import DataStore

_BACKLOG: Final = 128
_MAX_CONNECTIONS: Final = 32
_IDLE_SECONDS: Final = 60.0
_READ_BYTES: Final = 64 * 1024


def listen_unix(path: Path) -> socket.socket:
    """Bind a socket of mode 0600 in a directory that belongs to this user alone.

    The directory is made with mode 0700 where it does not exist. A socket without a listener any
    more is replaced. The path may be longer than the 107 bytes that a socket address holds.

    Raises:
        MachineError: others may enter the directory, or something else is at the path.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot serve metadata at {path}: {error.strerror}") from error
    with _directory(path.parent) as directory:
        details = os.fstat(directory)
        if details.st_uid != os.geteuid() or stat.S_IMODE(details.st_mode) & 0o077:
            raise MachineError(
                f"the metadata holds a private key, and others may enter {path.parent} "
                f"(owner {details.st_uid}, mode {stat.S_IMODE(details.st_mode):04o})",
                hint=f"use a directory that belongs to user {os.geteuid()} with mode 0700",
            )
        address = f"/proc/self/fd/{directory}/{path.name}"
        _remove_stale(address, path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the new file the mode of the unbound socket: there is no moment of 0755.
            os.fchmod(listener.fileno(), 0o600)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise MachineError(f"cannot serve metadata at {path}: {error.strerror}") from error
    return listener


def listen_tcp(host: str, port: int) -> socket.socket:
    """Bind a loopback or link-local address; port 0 picks a free one.

    Raises:
        MachineError: the address is reachable from elsewhere, or it cannot be bound.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise MachineError(f"cannot serve metadata at {host}: expected an IP address") from error
    if not 0 <= port <= 65535:
        raise MachineError(f"cannot serve metadata at {host}:{port}: a port is 0 to 65535")
    if not (address.is_loopback or address.is_link_local):
        raise MachineError(
            f"metadata is served on loopback or link-local addresses only, found {host}",
            hint="it holds the guest's private key",
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno or 0)  # Python's own text repeats the address
        raise MachineError(f"cannot serve metadata at {host}:{port}: {why}") from error


class MetadataEmulator:
    """Serves one `DataStore` over HTTP, as Firecracker would, until it is stopped.

    Args:
        store: the metadata.
        where: path of a UNIX socket, host and port of a loopback or link-local address, or a socket that
            listens on TCP already; it is closed with the emulator.
        version: V1 or V2 of the service.
        release: the Firecracker release to behave like.
        clock: seconds that only ever grow, for the expiry of tokens.
    """

    def __init__(
        self,
        store: DataStore,
        where: Path | tuple[str, int] | socket.socket,
        *,
        version: MmdsVersion = MmdsVersion.V2,
        release: tuple[int, int] = (1, 13),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The process may change its directory meanwhile, and a guest is in another one.
        self._where = where.absolute() if isinstance(where, Path) else where
        self._changing = threading.Lock()
        self._service = MetadataService(store, clock=clock, version=version, release=release)
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._inode: tuple[int, int] | None = None

    def listen(self) -> str:
        """Take connections, whose requests wait until `start`: a guest need not ask again and again.

        Returns:
            The address for a guest: `unix:/path` or `http://host:port`.

        Raises:
            MachineError: the address cannot be used.
        """
        where = self._where
        if isinstance(where, Path):
            if self._listener is None:
                self._listener = listen_unix(where)
                details = where.lstat()
                self._inode = (details.st_dev, details.st_ino)
            return f"unix:{where}"
        if self._listener is None:
            self._listener = where if isinstance(where, socket.socket) else listen_tcp(*where)
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> str:
        """Begin to serve; harmless when repeated.

        Returns:
            As `listen`.

        Raises:
            MachineError: as for `listen`.
        """
        with self._changing:
            return self._start()

    def _start(self) -> str:
        address, listener = self.listen(), self._listener
        if self._thread is not None:
            return address
        assert listener is not None  # noqa: S101 - made just now
        ready = threading.Event()
        thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listener, ready)), name="firebuild-mmds", daemon=True
        )
        thread.start()
        self._thread = thread  # once it runs: `stop` waits for it
        ready.wait()
        return address

    def stop(self) -> None:
        """Close every connection and the socket, and remove its file.

        Harmless when repeated, not started, or called by several threads at once.
        """
        with self._changing:
            self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
            self._thread = None
        elif self._listener is not None:
            self._listener.close()
        self._listener = None
        if isinstance(self._where, Path):
            with contextlib.suppress(FileNotFoundError):
                details = self._where.lstat()
                if (details.st_dev, details.st_ino) == self._inode:
                    self._where.unlink()

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        listener.setblocking(False)
        acceptor = Acceptor(listener, self._accept)
        ready.set()
        await self._stopping.wait()
        acceptor.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, sock: socket.socket, _: tuple[object, ...]) -> None:
        if len(self._connections) >= _MAX_CONNECTIONS:
            sock.close()
            return
        task = asyncio.create_task(self._converse(sock))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _: sock.close())

    async def _converse(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the guest went away or fell silent: there is no peer to tell
            buffer = b""
            keep_alive = True
            while keep_alive:
                answer, length, keep_alive = self._answer(buffer)
                if answer:
                    buffer = buffer[length:]
                    await self._loop.sock_sendall(sock, answer)
                    continue
                async with asyncio.timeout(_IDLE_SECONDS):
                    received = await self._loop.sock_recv(sock, _READ_BYTES)
                buffer += received
                keep_alive = bool(received)

    def _answer(self, buffer: bytes) -> tuple[bytes, int, bool]:
        try:
            parsed = parse_request(buffer)
        except BadRequest as error:
            return Response(400, str(error)).encode(keep_alive=False), len(buffer), False
        if parsed is None:
            return b"", 0, True
        request, length = parsed
        response = self._service.respond(request)
        return response.encode(keep_alive=request.keep_alive), length, request.keep_alive


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_stale(address: str, path: Path) -> None:
    try:
        mode = os.lstat(address).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise MachineError(
            f"cannot serve metadata at {path}: it exists and is not a socket",
            hint="remove it, or name another path",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(address)
            return
    raise MachineError(
        f"cannot serve metadata at {path}: another process serves there",
        hint="end that, or name another path",
    )
