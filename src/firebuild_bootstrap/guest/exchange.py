"""One HTTP/1.1 request and its answer (RFC 9112), as far as metadata services go.

Only what Firecracker's service and ours send: a body with its Content-Length. The standard library's
client can do more, and importing it takes longer than everything else before the first call.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping

_MAX_HEAD = 16 * 1024
_READ_BYTES = 64 * 1024
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: .*)?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
# For everything together: the socket's own limit begins anew with each byte.
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
