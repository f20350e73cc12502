"""Connections as the transport wants them: one TLS context, an end to every wait, an end to every socket."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
from urllib3.connection import HTTPConnection, HTTPSConnection


class Adapter(HTTPAdapter):
    """Uses one TLS context for all connections, whatever requests thinks of certificates.

    Args:
        context: of all connections.
        server_name: name to expect in the certificate, instead of the host.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        self._pool = {"ssl_context": context, "server_hostname": server_name}
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the manager of direct connections."""
        kwargs.update(self._pool)
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Make the manager of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs, **self._pool)
        manager.pool_classes_by_scheme = _POOLS
        return manager

    def build_connection_pool_key_attributes(self, request: requests.PreparedRequest, *_: Any) -> Any:
        """Leave TLS to the context."""
        parts = urlsplit(str(request.url))
        return {"scheme": parts.scheme, "host": parts.hostname, "port": parts.port}, {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave it to the context: requests would add a bundle of public CAs."""

    def close(self) -> None:
        """Close the sockets now; urllib3 would wait until nothing refers to a pool, and errors do."""
        managers: list[PoolManager] = [self.poolmanager, *self.proxy_manager.values()]
        for manager in managers:
            for pool in [manager.pools[key] for key in manager.pools.keys()]:  # noqa: SIM118 - not iterable
                pool.close()
        super().close()


class _Watched(HTTPConnection):
    """Bounds the wait for the head of an answer as a whole; a socket's timeout is for each byte."""

    def getresponse(self) -> Any:
        watchdog = _Watchdog(self.sock, self.timeout)
        try:
            response = super().getresponse()
        except (OSError, HTTPException):
            if watchdog.has_bitten:
                raise TimeoutError from None
            raise
        finally:
            watchdog.cancel()
        if watchdog.has_bitten:  # in the middle of the head, which then looks complete
            response.close()
            raise TimeoutError
        return response


class _WatchedTLS(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


_POOLS = {"http": _Pool, "https": _TLSPool}


class _Watchdog:
    def __init__(self, watched: socket.socket | None, seconds: float | None) -> None:
        self.has_bitten = False
        self._watched = watched
        self._timer = threading.Timer(seconds or 0, self._bite)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        self._timer.cancel()

    def _bite(self) -> None:
        self.has_bitten = True
        with suppress(OSError):  # it is closed already
            # not ssl's own, which is for one thread only
            socket.socket.shutdown(self._watched, socket.SHUT_RDWR)  # type: ignore[arg-type]


def speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Tell whether a port answers a TLS ClientHello with a record of TLS.

    Nothing but that one message is sent, and the connection is closed at the first bytes of the answer.

    Args:
        seconds: how long to wait for the connection, and for the answer.
    """
    sent = ssl.MemoryBIO()
    handshake = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), sent, server_hostname=host)
    with suppress(ssl.SSLWantReadError):
        handshake.do_handshake()
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.sendall(sent.read())
            answer = connection.recv(2)
    except OSError:
        return False
    # Alert or handshake, and the major version of all of TLS (RFC 8446, section 5.1).
    return len(answer) == 2 and answer[0] in (0x15, 0x16) and answer[1] == 0x03
