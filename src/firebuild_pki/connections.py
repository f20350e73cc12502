"""Connections to a server over HTTP: TLS that is always verified, and time limits that hold."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto
from http.client import HTTPException
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection

from firebuild_pki.errors import causes

_CUT = "unexpected eof while reading"


def client_context(anchors: str | None = None) -> ssl.SSLContext:
    """Return a context for connections to servers; verification is always on.

    Args:
        anchors: PEM certificates to trust instead of the system's; None for the system's.

    Raises:
        ssl.SSLError, ValueError: there is no certificate in `anchors`.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=anchors)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Not what this Python takes for granted: since 3.13 it refuses authorities without key identifiers,
    # which RFC 5280 wants and many private ones lack, and takes an intermediate as an anchor.
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class TlsFault(Enum):
    """Why TLS with a server failed, as far as what to do about it differs."""

    CUT = auto()
    NAME = auto()
    TIME = auto()
    ISSUER = auto()
    PLAIN = auto()
    REFUSED = auto()
    OTHER = auto()


def tls_fault(error: ssl.SSLError) -> tuple[TlsFault, str]:
    """Return what kind of fault it is, and the words for it; a connection that was cut may hold next time."""
    reason = (error.reason or "").lower().replace("_", " ")
    # OpenSSL 3 has several errors for a peer that closes the connection without a word of TLS.
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError) or reason == _CUT:
        return TlsFault.CUT, "the connection was cut off"
    if isinstance(error, ssl.SSLCertVerificationError):
        words = error.verify_message.rstrip(".").lower()
        kind = TlsFault.ISSUER
        if "mismatch" in words or "not valid for" in words:
            kind = TlsFault.NAME
        elif "expired" in words or "not yet valid" in words:
            kind = TlsFault.TIME
        return kind, f"its TLS certificate is not accepted: {words}"
    if "wrong version" in reason or "http request" in reason or "record layer" in reason:
        return TlsFault.PLAIN, "it does not speak TLS"
    if "alert" in reason:
        return TlsFault.REFUSED, f"it refused the TLS connection: {reason}"
    return TlsFault.OTHER, f"TLS failed: {reason or 'unknown reason'}"


def wrapped(error: BaseException) -> list[BaseException]:
    """Return an exception of requests or urllib3 and all that it wraps, in several layers of them."""
    return list(
        causes(error, lambda one: (*one.args, getattr(one, "reason", None), one.__cause__, one.__context__))
    )


def connection_words(chain: Sequence[BaseException]) -> str:
    """Say in a few words why a connection gave no answer; see `wrapped`."""
    names = {type(cause).__name__ for cause in chain}
    if "ProxyError" in names:
        return "the proxy in HTTPS_PROXY did not connect to it: " + _last_words(chain)
    if any("Timeout" in name for name in names):
        return "no answer in time"
    if "IncompleteRead" in names:
        return "the answer was cut off"
    return _last_words(chain)


def _last_words(chain: Sequence[BaseException]) -> str:
    for cause in chain:
        if isinstance(cause, OSError) and cause.strerror and cause.errno is not None:
            return cause.strerror.lower()
    if any(type(cause).__name__ == "RemoteDisconnected" for cause in chain):
        return "the connection was closed without an answer"
    return "the connection failed"


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


POOLS = {"http": _Pool, "https": _TLSPool}
"""Classes of connection pools for urllib3; their timeout is for the whole head of an answer."""


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
