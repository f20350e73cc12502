"""A directory to make a build context of, and a web server for ADD."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from firebuild_bootstrap.context import BuildContext, ContextResource
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.errors import Location
from support import serving

HERE = Location("Dockerfile", 5)
BODY = b"downloaded " * 1000
LONG = 64  # MiB of a body that nobody wants
Find = Callable[..., ContextResource]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The build context, with a secret beside it that no path may reach."""
    (tmp_path / "secret").write_text("outside")
    directory = tmp_path / "context"
    directory.mkdir()
    return directory


@pytest.fixture
def find(root: Path) -> Iterator[Find]:
    """Find sources in the build context as it is now, for the instruction at `HERE`."""
    contexts: list[BuildContext] = []

    def resource(*sources: str, unpack: bool = False) -> ContextResource:
        contexts.append(BuildContext(root))
        return contexts[-1].resource([Files(text) for text in sources], location=HERE, unpack=unpack)

    yield resource
    for context in contexts:
        context.close()


@dataclass
class Web:
    url: str
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    proxied: list[str] = field(default_factory=list)  # logins of requests that came to it as to a proxy
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.web.requests.append((self.path, self.headers["Authorization"]))
        if login := self.headers["Proxy-Authorization"]:
            self.web.proxied.append(login)
        path = self.path.partition("?")[0]
        if path.startswith("/status/"):
            self._answer(int(path.rpartition("/")[2]), b"error page")
        elif path == "/short":
            self._answer(200, BODY, length=len(BODY) + 1)
            self.close_connection = True
        elif path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nhello\r\n")
            self.close_connection = True
        elif path in ("/slow", "/slow-head"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            if path == "/slow":
                self.end_headers()
            else:
                self.flush_headers()
            self._trickle(b".")
        elif path == "/slow-chunk":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self._trickle(b"0")
        elif path.startswith("/long-redirect/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/long-redirect"))
            self.end_headers()
            with suppress(OSError):
                for _ in range(LONG):
                    self.web.sent += self.wfile.write(bytes(1 << 20))
            self.close_connection = True
        elif path == "/circle":
            self._answer(302, b"", location=path)
        elif path == "/silent":
            threading.Event().wait(1)
            self.close_connection = True
        elif path.startswith("/redirect/"):
            self._answer(302, b"", location=path.removeprefix("/redirect/"))
        else:
            self._answer(
                200, BODY, modified="Wed, 21 Oct 2015 07:28:00 GMT" if "dated" in path else "whenever"
            )

    def _trickle(self, piece: bytes) -> None:
        with suppress(OSError):
            while True:
                self.wfile.write(piece)
                threading.Event().wait(0.02)
        self.close_connection = True

    def _answer(
        self, status: int, body: bytes, *, length: int | None = None, location: str = "", modified: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if location:
            self.send_header("Location", location)
        if modified:
            self.send_header("Last-Modified", modified)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass


def web_server(tls: ssl.SSLContext | None = None) -> Iterator[Web]:
    handler = type("Handler", (Handler,), {})
    server = Server(("127.0.0.1", 0), handler)
    if tls is not None:
        # The handshake belongs to the handler, which closes the connection when it fails.
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    web = Web(f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}")
    handler.web = web  # type: ignore[attr-defined]
    with serving(server):
        yield web


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def web() -> Iterator[Web]:
    yield from web_server()


@pytest.fixture
def secure_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server whose certificate this process trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "web")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "web.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    yield from web_server(context)
