"""The HTTP of the metadata client, against what a service can send."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import pytest

from firebuild_bootstrap.guest.metadata import BadAnswer, TooLong, exchange


def ask(*answer: bytes, limit: int = 1000, pieces: Iterable[bytes] | None = None) -> tuple[int, bytes, bytes]:
    """Answer a request with the pieces and an end; returns status, body, and the request."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        sender = threading.Thread(target=_send, args=(ours, answer if pieces is None else pieces))
        sender.start()
        try:
            status, body = exchange(theirs, "box", "GET", "/x", {"Accept": "a/b"}, limit=limit)
        finally:
            theirs.close()
            sender.join()
        return status, body, ours.recv(4096)


def _send(sock: socket.socket, pieces: Iterable[bytes]) -> None:
    # The receiver may have enough before everything has been sent.
    with suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)


def test_a_request_names_the_host_and_the_headers() -> None:
    *_, request = ask(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert request == b"GET /x HTTP/1.1\r\nHost: box\r\nConnection: close\r\nAccept: a/b\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.0 200\r\ncontent-length:4\r\nServer: x\r\n\r\nbody, and more of a connection kept open",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nCONTENT-LENGTH:  4 \r\n\r\nbody",
    ],
)
def test_the_body_is_as_long_as_announced_however_it_arrives(answer: bytes) -> None:
    assert ask(answer)[:2] == (200, b"body")
    assert ask(*(bytes([byte]) for byte in answer))[:2] == (200, b"body")


def test_a_body_larger_than_one_read_is_complete() -> None:
    body = bytes(range(256)) * 4096
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    assert ask(head, body, limit=len(body))[:2] == (200, body)


@pytest.mark.parametrize(
    "rest", [b"\r\n", b"Content-Length: 5\r\n\r\nsorry", b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_of_a_refusal_only_the_status_counts(rest: bytes) -> None:
    assert ask(b"HTTP/1.1 405 Method Not Allowed\r\n" + rest)[:2] == (405, b"")


def test_a_body_over_the_limit_is_not_read() -> None:
    with pytest.raises(TooLong):
        ask(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n", limit=10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "closed before the head"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "closed before the head"),
        (b"SSH-2.0-SECRETWORD\r\n\r\n", "expected an HTTP/1.1 status line"),
        (b"HTTP/2 200\r\n\r\n", "expected an HTTP/1.1 status line"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "expected an HTTP/1.1 status line"),
        (b"HTTP/1.1 200 OK\r\n\r\nSECRETWORD", "one Content-Length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nSECRETWORD", "one Content-Length"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nSECRETWORD",
            "one Content-Length",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nSECRETWORD", "found a Transfer-Encoding"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nSECRETWORD", "closed 2 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "the head of the answer has more than 16384 bytes"),
    ],
)
def test_anything_else_is_refused_in_words_without_the_body(answer: bytes, words: str) -> None:
    with pytest.raises(BadAnswer, match=words) as caught:
        ask(answer)
    assert "SECRETWORD" not in str(caught.value)


def test_an_answer_that_drips_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_bootstrap.guest.metadata._ANSWER_SECONDS", 0.2)
    pieces = [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 200]

    def dripping() -> Iterator[bytes]:
        for piece in pieces:
            time.sleep(0.01)
            yield piece

    with pytest.raises(BadAnswer, match=r"not complete within 0\.2 seconds"):
        ask(pieces=dripping())
