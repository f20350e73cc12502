"""Reads the machine's metadata (MMDS), over TCP or a UNIX socket (Firecracker docs, mmds-user-guide.md).

No proxies and nothing of the environment takes part. Errors never quote the document: it holds a private key.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from .errors import InputError

DEFAULT_ADDRESS = "http://169.254.169.254"
_ATTEMPT_SECONDS = 5.0
# A machine may be started before its metadata are there: a build waits for this.
_PAUSE = 0.01
_MAX_DOCUMENT = 4 * 1024 * 1024
_TOKEN_SECONDS = "60"  # noqa: S105 - a lifetime
_NO_TOKENS = (404, 405, 501)  # MMDS V1, and servers that know no PUT, answer the request for a token so
_TCP_ADDRESS = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[^\s/:@?#\[\]]+)(?::([0-9]{1,5}))?/?")


class _NotYet(Exception):
    """The service can't answer at the moment."""


class MetadataClient:
    """A client of the metadata service.

    Args:
        address: `unix:/path/of/socket` or `http://host[:port]`.
        timeout: how many seconds to wait for the service to come up.
        clock: monotonic seconds.
        sleep: waits for seconds.

    Raises:
        InputError: the address is neither.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._clock = clock
        self._sleep = sleep
        self._host, self._connect = _connector(address)

    def read(self) -> dict[str, Any]:
        """Return `latest/meta-data`, with a session token (V2) where the service has them.

        Raises:
            InputError: the service stayed out of reach, refused, or sent no JSON object.
        """
        deadline = self._clock() + self._timeout
        while True:
            try:
                return self._document()
            except _NotYet as error:
                if self._clock() >= deadline:
                    raise InputError(
                        f"the metadata service at {self._address} did not answer within "
                        f"{self._timeout:g} s: {error}"
                    ) from error
            self._sleep(_PAUSE)

    def _document(self) -> dict[str, Any]:
        headers = {"Accept": "application/json"}
        status, body = self._request(
            "PUT", "/latest/api/token", {"X-metadata-token-ttl-seconds": _TOKEN_SECONDS}
        )
        if status == 200:
            headers["X-metadata-token"] = body.decode("latin-1").strip()
        elif status not in _NO_TOKENS:
            raise self._refused(status, "a session token")
        status, body = self._request("GET", "/latest/meta-data", headers)
        if status == 404:
            raise InputError(f"the metadata service at {self._address} has no latest/meta-data")
        if status != 200:
            raise self._refused(status, "latest/meta-data")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            # Without the cause: it would carry the text, and with it the private key.
            raise InputError(f"latest/meta-data at {self._address} is not a JSON object") from None
        return document

    def _refused(self, status: int, what: str) -> Exception:
        message = f"the metadata service at {self._address} refused {what} with HTTP status {status}"
        return _NotYet(message) if status >= 500 else InputError(message)

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        try:
            with self._connect() as connection:
                return exchange(connection, self._host, method, path, headers, limit=_MAX_DOCUMENT)
        except TooLong:
            raise InputError(f"the metadata at {self._address} has more than {_MAX_DOCUMENT} bytes") from None
        except UnicodeError as error:  # a label of more than 63 bytes, or an empty one
            raise InputError(f"--mmds {self._address}: expected a host name") from error
        except (OSError, BadAnswer) as error:
            raise _NotYet(f"{type(error).__name__}: {error}") from error


def _connector(address: str) -> tuple[str, Callable[[], socket.socket]]:
    """Return what the header Host says, and how to connect."""
    kind, _, path = address.partition(":")
    if kind == "unix" and path.startswith("/"):
        return "localhost", lambda: _connect_unix(path)
    found = _TCP_ADDRESS.fullmatch(address)
    if found is None or (port := int(found[2] or 80)) > 65535:
        raise InputError(f"--mmds {address}: expected unix:/path/of/socket or http://host[:port]")
    host = found[1].strip("[]")
    return found[1], lambda: socket.create_connection((host, port), _ATTEMPT_SECONDS)


def _connect_unix(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ATTEMPT_SECONDS)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


# --- HTTP -----------------------------------------------------------------------------------------

# One HTTP/1.1 request and its answer (RFC 9112): only what Firecracker's service and ours send, a body with
# its Content-Length. The standard library's client can do more, and importing it takes longer than everything
# else before the first call.
_MAX_HEAD = 16 * 1024
_READ_BYTES = 64 * 1024
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: .*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
# For everything together: the socket's own limit starts again with each byte.
_ANSWER_SECONDS = 30.0


class BadAnswer(Exception):
    """What came is not what a metadata service sends; the message holds nothing of a body."""


class TooLong(Exception):
    """The body is longer than what the caller takes."""


def exchange(
    sock: socket.socket, host: str, method: str, path: str, headers: Mapping[str, str], *, limit: int
) -> tuple[int, bytes]:
    """Send a request without a body and return the status, and the body if the status is 200.

    Args:
        sock: connected; it can't be used for anything else afterwards.
        host: value of the header Host.
        limit: how many bytes of a body to take.

    Raises:
        BadAnswer: see there.
        TooLong: more than `limit` bytes are announced.
        OSError: the connection failed or timed out.
    """
    deadline = time.monotonic() + _ANSWER_SECONDS
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    sock.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))
    head, body = _read_head(sock, deadline)
    status_line, *fields = head.split(b"\r\n")
    found = _STATUS_LINE.fullmatch(status_line)
    if found is None:
        raise BadAnswer("expected an HTTP/1.1 status line as the answer, found something else")
    status = int(found[1])
    return status, _read_body(sock, body, _length(fields), limit, deadline) if status == 200 else b""


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    if time.monotonic() > deadline:
        raise BadAnswer(f"the answer was not complete within {_ANSWER_SECONDS:g} seconds")
    return sock.recv(min(size, _READ_BYTES))


def _read_head(sock: socket.socket, deadline: float) -> tuple[bytes, bytes]:
    """Return the head without its empty line, and what came after it."""
    received = b""
    while b"\r\n\r\n" not in received:
        if len(received) > _MAX_HEAD:
            raise BadAnswer(f"the head of the answer has more than {_MAX_HEAD} bytes")
        piece = _receive(sock, _READ_BYTES, deadline)
        if not piece:
            raise BadAnswer("the connection was closed before the head of the answer was complete")
        received += piece
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def _length(fields: list[bytes]) -> int:
    named = [(name.lower(), value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
    if any(name == b"transfer-encoding" for name, _ in named):
        raise BadAnswer("expected a body with a Content-Length, found a Transfer-Encoding")
    lengths = {value for name, value in named if name == b"content-length"}
    if len(lengths) != 1 or not _LENGTH.fullmatch(min(lengths)):
        raise BadAnswer("expected a body with one Content-Length, found none, several or no number")
    return int(min(lengths))


def _read_body(sock: socket.socket, body: bytes, length: int, limit: int, deadline: float) -> bytes:
    if length > limit:
        raise TooLong
    pieces = [body]
    missing = length - len(body)
    while missing > 0:
        piece = _receive(sock, missing, deadline)
        if not piece:
            raise BadAnswer(f"the connection was closed {missing} bytes before the end of the answer")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)[:length]
