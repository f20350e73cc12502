"""Connections to a server over HTTP: TLS that is always verified, and time limits that hold."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from http.client import HTTPResponse
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from urllib3 import (
    BaseHTTPResponse,
    HTTPConnectionPool,
    HTTPSConnectionPool,
    PoolManager,
    ProxyManager,
    Timeout,
    make_headers,
)
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, LocationParseError, ProxyError

from firebuild_pki.display import one_line
from firebuild_pki.errors import CAError, causes
from firebuild_pki.homes import open_file, read_small
from firebuild_pki.values import dataclass

_CUT = "unexpected eof while reading"
_MOST_ANCHORS: Final = 16 << 20
"""Bytes; a system's bundle of all public CAs has a few hundred thousand."""
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
"""Statuses of answers that lead elsewhere (RFC 9110, section 15.4)."""


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


def tls_context(
    *,
    ca_file: str | Path | None = None,
    cert_file: str | Path | None = None,
    key_file: str | Path | None = None,
    passphrase: str = "",
    settings: tuple[str, str, str, str] = ("ca_file", "cert_file", "key_file", ""),
) -> ssl.SSLContext:
    """Return a context for connections to a server, of files that settings name; verification is always on.

    Args:
        ca_file: PEM certificates to trust instead of the system's.
        cert_file: PEM certificate of this client, with its chain.
        key_file: its private key.
        passphrase: of an encrypted key.
        settings: what these are called, for messages; no name for what there is no setting for.

    Raises:
        CAError: a file is missing, unreadable, of the wrong kind, or a key that everybody can read.
    """
    context = client_context(None if ca_file is None else read_anchors(ca_file, settings[0]))
    if cert_file is not None and key_file is not None:
        load_pair(context, cert_file, key_file, passphrase, settings=settings[1:])
    return context


def read_anchors(path: str | Path, setting: str) -> str:
    """Return the PEM certificates in the file that a setting names.

    Around them may be anything: systems name the CAs in their bundles in comments, in UTF-8.

    Raises:
        CAError: it can't be read, is too large, or has none.
    """
    text = ""
    try:
        text = read_small(os.path.expanduser(path), _MOST_ANCHORS).decode("ascii", "ignore")
        client_context(text or "-")
    except OSError as error:
        if isinstance(error, ssl.SSLError):
            raise _no_certificates(path, setting) from None
        raise CAError(f"cannot read {setting} {one_line(str(path))}: {error.strerror}") from error
    except ValueError:
        raise _no_certificates(path, setting) from None
    return text


def _no_certificates(path: str | Path, setting: str) -> CAError:
    shown = one_line(str(path))
    return CAError(
        f"expected PEM certificates in {setting} {shown}, found none, or one that can't be read",
        hint=f"`firebuild ca inspect {shown}` tells what is in it",
    )


def load_pair(
    context: ssl.SSLContext,
    cert_file: str | Path,
    key_file: str | Path,
    passphrase: str,
    *,
    settings: tuple[str, str, str] = ("cert_file", "key_file", "key_passphrase"),
) -> None:
    """Have a context show a client certificate.

    Raises:
        CAError: as `tls_context`.
    """
    certificate, key = map(os.path.expanduser, (cert_file, key_file))
    names = " and ".join(settings[:2])
    asked: list[bool] = []

    def password() -> str:  # without one OpenSSL would ask for it at the terminal
        asked.append(True)
        return passphrase

    setting, path = settings[0], certificate
    try:
        open_file(path).close()  # OpenSSL would wait for a pipe, and read a device without end
        setting, path = settings[1], key
        with open_file(path) as file:
            mode = os.fstat(file.fileno()).st_mode
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            raise CAError(
                f"{setting} {one_line(key)} is open to every user (mode {stat.S_IMODE(mode):04o})",
                hint=f"chmod 600 {one_line(key)}",
            )
        context.load_cert_chain(certificate, key, password=password)
    except ssl.SSLError as error:
        if asked:
            why = "the passphrase is not that of the key" if passphrase else "the key is encrypted"
            hint = f"set {settings[2]} to its passphrase" if settings[2] else "store it without a passphrase"
            raise CAError(f"{names} cannot be used: {why}", hint=hint) from None
        reason = (error.reason or "neither is in the PEM format").replace("_", " ").lower()
        raise CAError(f"{names} cannot be used: {reason}", hint=f"look at {names}") from None
    except OSError as error:
        raise CAError(f"cannot read {setting} {one_line(path)}: {error.strerror}") from error


def make_pool(
    context: ssl.SSLContext | None, proxy: str | None, *, several: int = 1, server_name: str | None = None
) -> PoolManager:
    """Return what keeps connections, whose time limits are for the whole head of an answer.

    Args:
        proxy: its URL, with a user and password where it wants them; http where it names no scheme.
        several: connections that are kept for each host.
        server_name: to expect in certificates instead of the host.

    Raises:
        UnusableProxy: `proxy` is not the URL of a proxy that speaks HTTP.
    """
    pool: PoolManager
    if proxy is None:
        pool = PoolManager(ssl_context=context, maxsize=several, server_hostname=server_name)
    else:
        parts = proxy_parts(proxy)
        headers = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers = make_headers(proxy_basic_auth=pair)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        pool = ProxyManager(
            bare,
            ssl_context=context,
            maxsize=several,
            proxy_headers=headers,
            server_hostname=server_name,
        )
    pool.pool_classes_by_scheme = _POOLS
    return pool


class UnusableProxy(HTTPError):
    """The environment names a proxy by what is no address, which is not shown: it may hold a password."""


def proxy_parts(proxy: str) -> SplitResult:
    """Read the URL of a proxy; http where it names no scheme.

    Raises:
        UnusableProxy: it is not the URL of a proxy that speaks HTTP.
    """
    expected = (
        "expected the address of a proxy, such as http://proxy.example:3128, "
        "in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY"
    )
    try:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        usable = bool(parts.hostname) and parts.port != 0 and not any(map(str.isspace, parts.netloc))
    except ValueError:
        raise UnusableProxy(f"{expected}, found something else") from None
    if parts.scheme not in ("http", "https"):
        raise UnusableProxy(f"{expected}, found the scheme {one_line(parts.scheme, 20)}")
    if not usable:
        raise UnusableProxy(f"{expected}, found something else")
    return parts


def send(
    pool: PoolManager,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str],
    body: Any = None,
    timeout: float | Timeout,
) -> BaseHTTPResponse:
    """Send one request, and return its answer: not read yet, not decoded, and no redirect followed.

    Args:
        headers: besides those that every request has.
        body: bytes, or what has `read`.
        timeout: in seconds, for the connection and for each read.

    Raises:
        HTTPError, HTTPException, OSError, ValueError: there was no answer. They hold the request with its
            headers, so none of them may get out.
    """
    return pool.urlopen(
        method,
        url,
        body=body,
        headers={"User-Agent": "firebuild", "Accept-Encoding": "identity", **headers},
        redirect=False,
        retries=False,
        preload_content=False,
        decode_content=False,
        timeout=timeout,
    )


def close_now(manager: PoolManager) -> None:
    """Close the connections of a pool, now: urllib3 would wait until nothing refers to it, and errors do."""
    for pool in [manager.pools[key] for key in manager.pools.keys()]:  # noqa: SIM118 - not iterable
        pool.close()


def read_retry_after(text: str | None) -> float:
    """Read Retry-After: seconds, or a date (RFC 9110, section 10.2.3); 0 for nothing of the kind."""
    if text is None:
        return 0.0
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


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


LATE: Final = "no answer in time"
CUT_OFF: Final = "the answer was cut off"
NAMELESS: Final = "its name can't be looked up"
BY_PROXY: Final = "is the proxy running, and its address right? NO_PROXY names what is reached without it"
"""The hint where `is_of_proxy`."""
_NO_TUNNEL: Final = "Tunnel connection failed: "  # http.client, and the status of the proxy


def is_permanent(chain: Sequence[BaseException]) -> bool:
    """Tell whether a connection would fail for the same reason the next time; see `wrapped`."""
    for cause in chain:
        if isinstance(cause, LocationParseError | UnusableProxy):
            return True
        if isinstance(cause, socket.gaierror):
            return cause.errno != socket.EAI_AGAIN
        if isinstance(cause, ssl.SSLError):
            return tls_fault(cause)[0] is not TlsFault.CUT
    return False


def tls_error(chain: Sequence[BaseException]) -> ssl.SSLError | None:
    """Return the error of TLS with the server itself, if it is that; a proxy may speak TLS, too."""
    if is_of_proxy(chain):
        return None
    return next((cause for cause in chain if isinstance(cause, ssl.SSLError)), None)


def is_of_proxy(chain: Sequence[BaseException]) -> bool:
    """Tell whether it was the proxy that was not reached, or that would not connect."""
    return any(isinstance(cause, ProxyError) for cause in chain)


def connection_words(chain: Sequence[BaseException]) -> str:
    """Say in a few words why a connection gave no answer; see `wrapped`."""
    for cause in chain:
        if isinstance(cause, UnusableProxy | LocationParseError):
            return str(cause) if isinstance(cause, UnusableProxy) else "not a usable address"
    names = {type(cause).__name__ for cause in chain}
    if is_of_proxy(chain):
        late = any("Timeout" in name for name in names)
        return f"no connection by the proxy of the environment: {LATE if late else _last_words(chain)}"
    if any("Timeout" in name for name in names):
        return LATE
    if "IncompleteRead" in names:
        return CUT_OFF
    if "BadStatusLine" in names:
        return "it does not answer in HTTP"
    return _last_words(chain)


def _last_words(chain: Sequence[BaseException]) -> str:
    for cause in chain:
        if isinstance(cause, ssl.SSLError):
            return tls_fault(cause)[1]
        if isinstance(cause, socket.gaierror):
            return NAMELESS
        if isinstance(cause, OSError) and cause.strerror and cause.errno is not None:
            return cause.strerror.lower()
        if isinstance(cause, OSError) and str(cause).startswith(_NO_TUNNEL):
            return f"it answered {one_line(str(cause).removeprefix(_NO_TUNNEL), 100)}"
    if any(type(cause).__name__ == "RemoteDisconnected" for cause in chain):
        return "the connection was closed without an answer"
    return "the connection failed"


@dataclass(frozen=False, slots=True)
class _Traffic:
    """Requests, bytes sent and received, of all connections of this process."""

    counts: tuple[int, int, int] = (0, 0, 0)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, requests: int, sent: int, received: int) -> None:
        with self.lock:
            before = self.counts
            self.counts = (before[0] + requests, before[1] + sent, before[2] + received)


_traffic = _Traffic()


def traffic() -> tuple[int, int, int]:
    """Return how many requests this process made, and bytes sent and received, TLS not counted."""
    return _traffic.counts


class _Reader(RawIOBase):
    """What comes from a socket; while `end` is set, until then only: a socket's timeout is for each read."""

    def __init__(self, raw: RawIOBase, watched: socket.socket) -> None:
        self.end: float | None = None
        self._raw = raw
        self._socket = watched

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.end is not None:
            left = self.end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")  # as a socket says it
            self._socket.settimeout(left)
        count: int | None = self._raw.readinto(buffer)
        _traffic.add(0, 0, count or 0)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class BoundedResponse(HTTPResponse):
    """Bounds the wait for the head of an answer, and for each `read1`, by the timeout of its socket.

    A socket has it for each byte, and `read1` waits for a whole line before a chunk, of up to 65,536 bytes.
    """

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._socket = sock
        self._reader = _Reader(self.fp.detach(), sock)
        self.fp = BufferedReader(self._reader)

    def begin(self) -> None:
        """See http.client."""
        with self._in_time():
            super().begin()

    def read1(self, n: int = -1) -> bytes:
        """See http.client."""
        with self._in_time():
            return super().read1(n)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        timeout = self._socket.gettimeout()
        self._reader.end = None if timeout is None else time.monotonic() + timeout
        yield
        self._reader.end = None
        if self._socket.fileno() >= 0:  # it is closed with the end of the last answer
            self._socket.settimeout(timeout)


class _Timed(HTTPConnection):
    response_class = BoundedResponse

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        _traffic.add(1, 0, 0)
        super().putrequest(*args, **kwargs)

    def send(self, data: Any) -> None:
        super().send(data)
        _traffic.add(0, len(data) if isinstance(data, bytes | bytearray) else 0, 0)


class _TimedTLS(_Timed, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Timed


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TimedTLS

    def _validate_conn(self, conn: Any) -> None:
        # urllib3 would write a warning too, of a provider that asks for what it knows the fingerprint of.
        if conn.is_closed:
            conn.connect()


_POOLS = {"http": _Pool, "https": _TLSPool}
"""Classes of connection pools for urllib3; their timeout is for the whole head of an answer."""


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
