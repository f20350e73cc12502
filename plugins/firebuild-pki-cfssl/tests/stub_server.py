"""A server for what a real cfssl cannot be made to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Stub:
    """Answers each request with the next of the answers, the last one again and again.

    An answer is a status and a body; None stands for no answer at all.
    """

    answers: list[tuple[int, bytes] | None] = field(default_factory=list)
    address: str = ""
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    dated: bool = True
    released: threading.Event = field(default_factory=threading.Event)

    def next(self) -> tuple[int, bytes] | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def success(**result: object) -> tuple[int, bytes]:
    messages = [{"code": 1, "message": "remember the milk"}, "not a message"]
    return 200, json.dumps({"success": True, "result": result, "errors": [], "messages": messages}).encode()


def refusal(message: str, status: int = 400) -> tuple[int, bytes]:
    errors = [{"code": 1, "message": message}]
    return status, json.dumps({"success": False, "result": None, "errors": errors, "messages": []}).encode()


@contextmanager
def running(stub: Stub) -> Iterator[Stub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            stub.paths.append(self.path)
            stub.headers.append(dict(self.headers.items()))
            stub.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = stub.next()
            if answer is None:
                stub.released.wait()
                return
            status, body = answer
            self.send_response_only(status)
            if stub.dated:
                self.send_header("Date", self.date_time_string())
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    stub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield stub
    finally:
        stub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
