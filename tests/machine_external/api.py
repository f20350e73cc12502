"""As much of Firecracker's API as the metadata of somebody else's Firecracker need."""

from __future__ import annotations

import json
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from firebuild_bootstrap.mmds import DataStore
from firebuild_bootstrap.mmds.store import StoreError
from machine_external.tool import Tool


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = False
    api: FirecrackerApiStandIn


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, self.server.api.identity if self.path == "/" else {})

    def do_PUT(self) -> None:
        self._change(self.server.api.store.put)

    def do_PATCH(self) -> None:
        self._change(self.server.api.store.patch)

    def _change(self, change: Any) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.api.calls.append(f"{self.command} {self.path}")
        if self.server.api.refuse:
            self._answer(self.server.api.refuse, {"fault_message": "no"})
            return
        try:
            change(json.loads(body))
        except StoreError as error:
            self._answer(error.status, {"fault_message": body.decode()})  # the worst that it could say
            return
        self.server.api.changed()
        self._answer(204, None)

    def _answer(self, status: int, document: Any) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class FirecrackerApiStandIn:
    """Serves the API on a socket; the metadata go on to a tool."""

    def __init__(self, path: Path, tool: Tool | None = None, *, limit: int = 51_200) -> None:
        self.store = DataStore(limit)
        self.identity: dict[str, Any] = {"state": "Not started", "id": "x", "vmm_version": "1.13.0"}
        self.calls: list[str] = []
        self.refuse = 0
        self._tool = tool
        self._server = _Server(str(path), _Handler)
        self._server.api = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def changed(self) -> None:
        if self._tool is not None:
            self._tool.update(self.store.get(""))

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
