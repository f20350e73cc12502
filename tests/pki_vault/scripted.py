"""A server that answers by script: for what a real one cannot be made to say."""

from __future__ import annotations

import io
import json
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from support import serving

Slow = Literal["head", "headers", "body"]

SEALED = (503, {"errors": ["Vault is sealed"]})
NO_LEADER = (500, {"errors": ["local node not active but active cluster node not found"]})


@dataclass(frozen=True)
class Reply:
    """One scripted answer.

    Args:
        status: HTTP status; 0 resets the connection, -1 closes it.
        body: JSON, or text as it is.
        headers: further ones.
        missing: bytes that Content-Length promises and that never come.
        pause: seconds before each byte, from where `slow` says.
        slow: where the pauses begin: at the start, behind the status line, or in the body.
    """

    status: int
    body: object = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0
    pause: float = 0.0
    slow: Slow = "head"


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Scripted(ThreadingHTTPServer):
    """Answers the first requests by script, and all others with the last reply."""

    daemon_threads = True

    def __init__(self, *replies: Reply) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = list(replies)
        self.seen: list[Seen] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_reply(self) -> Reply:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go away are part of the script."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(Seen(self.command, self.path, dict(self.headers), body))
        reply = self.server.next_reply()
        if reply.status == -1:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if reply.status == 0:
            # with a linger time of zero, closing sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        text = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        kind = "text/html" if isinstance(reply.body, str) else "application/json"
        self.send_response_only(reply.status)
        for name, value in {"Content-Type": kind, **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text) + reply.missing))
        head = io.BytesIO()
        head, self.wfile = self.wfile, head  # type: ignore[assignment]
        self.end_headers()
        head, self.wfile = self.wfile, head
        whole = head.getvalue() + text
        quick = {"head": 0, "headers": whole.index(b"\n") + 1, "body": len(head.getvalue())}[reply.slow]
        self.wfile.write(whole[:quick])
        self._write(whole[quick:], reply.pause)

    def _write(self, text: bytes, pause: float) -> None:
        if not pause:
            self.wfile.write(text)
            return
        for byte in text:
            time.sleep(pause)
            self.wfile.write(bytes([byte]))

    do_POST = do_GET  # noqa: N815 - the name that the base class looks for

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def scripted(*replies: Reply | tuple[int, object]) -> Iterator[Scripted]:
    """Run a scripted server."""
    made = [reply if isinstance(reply, Reply) else Reply(*reply) for reply in replies]
    server = Scripted(*made)
    with serving(server):
        yield server


@dataclass
class FakeTime:
    """Time that passes only while somebody sleeps."""

    now: float = 1000.0
    naps: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds
