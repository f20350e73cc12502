"""The HTTP client that providers share: what it tries again, what it refuses, and where secrets go."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from firebuild_pki import CAError
from firebuild_pki.addresses import proxy_for
from firebuild_pki.http import HTTPClient, HTTPFailure, TlsFault, audit_headers, tls_context
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.provider import Profile
from firebuild_pki.x509 import Validity, make_leaf, make_root, to_pem
from support import serving

SECRET = "token-of-the-backend"


class Backend(ThreadingHTTPServer):
    """Answers with the next of `answers`, the last one again and again: status, headers, body."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], bytes]] = [(200, {}, b"{}")]
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.requests.append((self.path, dict(self.headers.items()), body))
        answers = self.server.answers
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "cut" in headers

    do_GET = do_CONNECT = do_POST  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def served(backend: Backend) -> Iterator[Backend]:
    with serving(backend):
        yield backend


@pytest.fixture
def backend() -> Iterator[Backend]:
    with served(Backend()) as running:
        yield running


@pytest.fixture
def pauses() -> list[float]:
    return []


Connect = Callable[..., HTTPClient]


@pytest.fixture
def connect(backend: Backend, pauses: list[float]) -> Iterator[Connect]:
    made: list[HTTPClient] = []

    def connect(address: str = "", **options: Any) -> HTTPClient:
        options = {"environ": {}, "pause": pauses.append, **options}
        made.append(HTTPClient(address or f"http://127.0.0.1:{backend.port}/pki/", **options))
        return made[-1]

    yield connect
    for client in made:
        client.close()
        client.close()


def failure(client: HTTPClient) -> HTTPFailure:
    with pytest.raises(HTTPFailure) as caught:
        client.request("POST", "/sign", b"{}", headers={"Authorization": SECRET})
    assert SECRET not in repr(caught.value) + str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


def test_an_answer_is_what_the_server_said(
    backend: Backend, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    date = "Sat, 28 Nov 2026 20:00:00 GMT"
    backend.answers = [(201, {"Date": date, "X-Id": "7"}, b'{"a": "\\u001b[31m"}')]
    client = connect()
    answer = client.request("POST", "/sign", b"body", headers={"Authorization": SECRET})
    path, headers, body = backend.requests[0]
    assert (path, headers["Authorization"], body) == ("/pki/sign", SECRET, b"body")
    assert (answer.status, answer.json, answer.headers["x-id"]) == (201, {"a": "\x1b[31m"}, "7")
    assert answer.date == datetime(2026, 11, 28, 20, tzinfo=UTC)
    assert "\x1b" not in answer.words
    assert "31m" not in repr(answer)
    backend.answers = [(404, {"Date": "yesterday"}, b"\xff<html>")]
    answer = client.request("GET", "/none")
    assert (answer.status, answer.json, answer.date, answer.is_passing) == (404, None, None, False)
    assert SECRET not in caplog.text


def test_what_may_pass_is_tried_again_later_each_time(
    backend: Backend, connect: Connect, pauses: list[float]
) -> None:
    backend.answers = [(503, {}, b""), (429, {"Retry-After": "7"}, b""), (200, {}, b"[1]")]
    assert connect(attempts=3).request("POST", "/").json == [1]
    assert 0.25 <= pauses[0] <= 0.5
    assert pauses[1] == 7.0
    pauses.clear()
    backend.answers = [(503, {}, b"busy")]
    answer = connect(attempts=3).request("POST", "/")
    assert (answer.status, answer.words, answer.is_passing, len(pauses)) == (503, "busy", True, 2)
    assert 0.5 <= pauses[1] <= 1.0
    # Nor is a limit by the hour waited for, nor anything done twice that must not be.
    pauses.clear()
    backend.answers = [(429, {"Retry-After": "3600"}, b"")]
    assert connect().request("POST", "/").retry_after == 3600
    backend.answers = [(503, {}, b"")]
    assert connect().request("POST", "/", again=False).status == 503
    backend.answers = [(500, {}, b""), (200, {}, b"")]
    assert connect().request("POST", "/").status == 500
    assert pauses == []


def test_who_waits_long_is_told_once_of_what(backend: Backend, connect: Connect) -> None:
    told: list[str] = []
    backend.answers = [(503, {"Retry-After": "9"}, b""), (503, {"Retry-After": "9"}, b""), (200, {}, b"[1]")]
    assert connect(attempts=3, report=told.append).request("POST", "/").json == [1]
    assert told == [
        f"no usable answer from http://127.0.0.1:{backend.port}/pki: status 503; trying up to 3 times"
    ]
    told.clear()
    with pytest.raises(HTTPFailure, match="connection refused"):
        connect("http://127.0.0.1:1", report=told.append).request("POST", "/")
    assert told == []  # it is over in a second


def test_what_a_request_is_for_can_be_told_in_headers(backend: Backend, connect: Connect) -> None:
    labels = {"image-tag": "shop/web:1.2", "build": "not this one"}
    connect().request("POST", "/sign", b"{}", headers=audit_headers("b7", labels))
    told = {name: value for name, value in backend.requests[0][1].items() if name.startswith("X-Firebuild-")}
    assert told == {"X-Firebuild-Build": "b7", "X-Firebuild-Image-Tag": "shop/web:1.2"}


def test_a_redirect_is_an_answer_and_leads_nowhere(backend: Backend, connect: Connect) -> None:
    backend.answers = [(307, {"Location": f"http://127.0.0.1:{backend.port}/elsewhere"}, b"")]
    assert connect().request("POST", "/sign", headers={"Authorization": SECRET}).status == 307
    assert [path for path, _, _ in backend.requests] == ["/pki/sign"]


def test_an_answer_is_bounded_in_size_and_time(
    backend: Backend, connect: Connect, pauses: list[float]
) -> None:
    backend.answers = [(200, {}, bytes(1001))]
    error = failure(connect(longest=1000))
    assert (error.message.rpartition(": ")[2], error.retryable) == (
        "the answer is longer than 1000 bytes",
        False,
    )
    backend.answers = [(200, {}, bytes(1 << 20)), (200, {}, bytes((1 << 20) + 1))]
    assert len(connect().request("GET", "/").body) == 1 << 20
    assert failure(connect()).message.endswith(": the answer is longer than 1048576 bytes")
    backend.answers = [(200, {"Content-Length": "9", "cut": "1"}, b"x")]
    assert failure(connect(attempts=2)).message.endswith(": the answer was cut off")
    assert len(pauses) == 1
    seconds = iter(range(0, 1000, 6))
    backend.answers = [(200, {}, b"x")]
    late = failure(connect(attempts=1, clock=lambda: float(next(seconds)), timeout=5.0))
    assert (late.message.rpartition(": ")[2], late.retryable) == ("no answer in time", True)
    seconds = iter(range(0, 1000, 11))
    late = failure(connect(attempts=1, clock=lambda: float(next(seconds))))
    assert late.message.endswith(": no answer in time")


def test_where_nobody_is_there_it_is_said_what_to_do(connect: Connect) -> None:
    unused = Backend()
    address = f"http://127.0.0.1:{unused.port}"
    unused.server_close()
    error = failure(connect(address, unreachable="start it"))
    assert (error.message, error.hint, error.retryable) == (
        f"{address}: connection refused",
        "start it",
        True,
    )
    error = failure(connect("https://backend.invalid", attempts=1))
    assert error.message == "https://backend.invalid: its name can't be looked up"


@pytest.mark.parametrize("address", ["http://backend.example", "ftp://127.0.0.1", "https://", "x"])
def test_secrets_go_to_https_or_this_machine(connect: Connect, address: str) -> None:
    with pytest.raises(ValueError, match="secrets go to https"):
        connect(address)


@pytest.mark.parametrize("path", ["@elsewhere.example/sign", ".elsewhere.example/sign", "sign", ""])
def test_a_path_cannot_change_the_host(backend: Backend, connect: Connect, path: str) -> None:
    with pytest.raises(ValueError, match="begins with a slash"):
        connect().request("POST", path, headers={"Authorization": SECRET})
    assert not backend.requests


@pytest.mark.parametrize("odd", ["\n", "\r\nX-More: 1", "\0", "\u20ac"])
def test_a_header_that_cannot_be_sent_is_named_without_its_value(
    backend: Backend, connect: Connect, pauses: list[float], odd: str
) -> None:
    with pytest.raises(HTTPFailure, match=r"header Authorization \(not shown\)") as refused:
        connect().request("POST", "/sign", headers={"Authorization": f"{SECRET}{odd}"})
    assert not refused.value.retryable
    assert refused.value.__context__ is None
    assert SECRET not in str(refused.value)
    assert not backend.requests
    assert not pauses


def test_a_proxy_is_asked_to_connect_and_its_password_is_shown_nowhere(
    backend: Backend, connect: Connect
) -> None:
    backend.answers = [(403, {}, b"")]
    environ = {"HTTPS_PROXY": f"http://me:{SECRET}@127.0.0.1:{backend.port}", "NO_PROXY": "other.example"}
    error = failure(connect("https://backend.example", environ=environ, attempts=1))
    assert error.message.endswith("no connection by the proxy of the environment: it answered 403 Forbidden")
    (connected,) = backend.requests
    assert connected[0] == "backend.example:443"
    assert connected[1]["proxy-authorization"].startswith("Basic ")


def test_a_proxy_that_has_no_address_is_told_from_the_server(connect: Connect) -> None:
    environ = {"HTTPS_PROXY": f"http://me:{SECRET}@proxy.invalid:3128"}
    error = failure(connect("https://backend.example", environ=environ, attempts=1))
    assert error.message == (
        "https://backend.example: no connection by the proxy of the environment: its name can't be looked up"
    )
    assert "is the proxy running" in (error.hint or "")
    assert SECRET not in str(error)


@pytest.mark.parametrize(
    ("url", "no_proxy", "goes_through"),
    [
        ("https://backend.example:8200", "other, backend.example", False),
        ("https://a.backend.example", ".example", False),
        ("https://a.backend.example", "*.backend.example", False),
        ("https://backend.example", "*", False),
        ("https://backend.example:8200", "backend.example:8200", False),
        ("https://backend.example", "backend.example:443", False),
        ("https://backend.example:8201", "backend.example:8200", True),
        ("https://notbackend.example", "backend.example", True),
        ("https://10.1.2.3", "10.0.0.0/8", False),
        ("https://11.1.2.3", "10.0.0.0/8,2001:db8::/32", True),
        ("https://[2001:db8::7]:5000", "2001:db8::/32", False),
        ("https://[2001:db8::7]:5000", "[2001:db8::7]:5000", False),
        ("https://backend.example", ", x:port, [::1, 10.0.0.0/99", True),
        ("https://[::1]:5000", "", False),
        ("http://backend.example", "", False),
    ],
)
def test_no_proxy_is_read_as_programs_in_go_read_it(url: str, no_proxy: str, goes_through: bool) -> None:
    environ = {"https_proxy": "http://proxy.example:3128", "NO_PROXY": no_proxy}
    assert (proxy_for(url, environ) is not None) == goes_through


def test_plain_http_has_a_proxy_only_for_who_sends_nothing_secret() -> None:
    environ = {"HTTP_PROXY": "http://a.example:1", "HTTPS_PROXY": "http://b.example:2"}
    assert proxy_for("http://backend.example", environ, plain=True) == "http://a.example:1"
    assert proxy_for("https://backend.example", environ, plain=True) == "http://b.example:2"
    assert proxy_for("http://backend.example", environ) is None
    exempt = {**environ, "NO_PROXY": "backend.example:80"}
    assert proxy_for("http://backend.example", exempt, plain=True) is None


# --- TLS ----------------------------------------------------------------------------------------------


class Files:
    """A CA, and a server and a client that it has signed for."""

    def __init__(self, directory: Path) -> None:
        now = datetime.now(UTC)
        validity = Validity(now.replace(year=now.year - 1), now.replace(year=now.year + 1))
        root = make_root(generate_key(), validity, with_intermediate=False)
        self.ca = self._written(directory / "ca.pem", to_pem([root.certificate]))
        for name, profile in (("server", Profile.SERVER), ("client", Profile.GUEST)):
            key = generate_key()
            leaf = make_leaf(key.public_key(), root, validity, profile=profile, dns_names=["localhost"])
            self._written(directory / f"{name}.pem", to_pem([leaf]))
            self._written(directory / f"{name}-key.pem", private_key_pem(key))
        self.directory = directory

    def _written(self, path: Path, data: bytes) -> Path:
        path.write_bytes(data)
        path.chmod(0o600)
        return path

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.directory / f"{name}.pem", self.directory / f"{name}-key.pem"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls_backend(files: Files) -> Iterator[Backend]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files.pair("server"))
    context.load_verify_locations(files.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    made = Backend()
    made.socket = context.wrap_socket(made.socket, server_side=True, do_handshake_on_connect=False)
    with served(made) as running:
        yield running


HINTS = {fault: f"hint for {fault.name}" for fault in TlsFault}


def test_both_ends_are_verified(
    files: Files, tls_backend: Backend, connect: Connect, backend: Backend
) -> None:
    cert, key = files.pair("client")
    address = f"https://localhost:{tls_backend.port}"
    mutual = tls_context(ca_file=files.ca, cert_file=cert, key_file=key)
    assert connect(address, context=mutual).request("POST", "/").json == {}
    named = connect(f"https://127.0.0.1:{tls_backend.port}", context=mutual, server_name="localhost")
    assert named.request("POST", "/").status == 200
    for client, fault in (
        (connect(address, hints=HINTS), TlsFault.ISSUER),
        (connect(f"https://127.0.0.1:{tls_backend.port}", context=mutual, hints=HINTS), TlsFault.NAME),
        (connect(f"https://localhost:{backend.port}", hints=HINTS), TlsFault.PLAIN),
    ):
        error = failure(client)
        assert (error.fault, error.hint) == (fault, HINTS[fault])
    # In TLS 1.3 a server may hang up before its alert arrives.
    refused = failure(connect(address, context=tls_context(ca_file=files.ca), hints=HINTS))
    assert refused.fault in {TlsFault.REFUSED, TlsFault.CUT}
    assert refused.hint == HINTS[refused.fault]


def test_a_connection_that_was_cut_may_be_a_refusal() -> None:
    def cut() -> None:
        connection = listener.accept()[0]
        connection.recv(1 << 16)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=cut)
        thread.start()
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        hints = {TlsFault.REFUSED: "it wants a certificate"}
        failed = failure(HTTPClient(address, environ={}, attempts=1, hints=hints))
        thread.join()
    assert failed.hint == "it wants a certificate"
    assert failed.retryable


def test_files_that_are_of_no_use_are_named_as_the_settings_name_them(files: Files, tmp_path: Path) -> None:
    cert, key = files.pair("client")
    other = files.pair("server")[1]
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "cut").write_bytes(cert.read_bytes() + cert.read_bytes()[:200])
    (tmp_path / "open").write_bytes(key.read_bytes())
    (tmp_path / "open").chmod(0o644)
    names = ("tls.ca", "tls.cert", "tls.key", "")
    none = tmp_path / "none"
    where: dict[str, Any] = {"cert_file": cert, "key_file": key}
    for given, said in (
        ({"ca_file": none}, f"cannot read tls.ca {none}: No such file or directory"),
        ({"ca_file": key}, f"expected PEM certificates in tls.ca {key}, found none"),
        ({"ca_file": "/dev/zero"}, "cannot read tls.ca /dev/zero: it has more than 16777216 bytes"),
        ({"ca_file": tmp_path / "cut"}, "found none, or one that can't be read"),
        ({"ca_file": tmp_path / "binary"}, "expected PEM certificates in tls.ca"),
        ({**where, "cert_file": none}, f"cannot read tls.cert {none}: No such file"),
        ({**where, "key_file": none}, f"cannot read tls.key {none}: No such file"),
        ({**where, "key_file": tmp_path / "open"}, "tls.key .*open is open to every user"),
        ({**where, "key_file": other}, "tls.cert and tls.key cannot be used: key values mismatch"),
        ({**where, "cert_file": key}, "tls.cert and tls.key cannot be used: "),
    ):
        with pytest.raises(CAError, match=said):
            tls_context(settings=names, **given)


def test_a_bundle_of_a_system_names_its_cas_in_comments(files: Files, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes("\ufeff# Főtanúsítvány\n".encode() + files.ca.read_bytes())
    (trusted,) = tls_context(ca_file=bundle).get_ca_certs()
    assert [trusted] == tls_context(ca_file=files.ca).get_ca_certs()


def test_an_encrypted_key_needs_its_passphrase(files: Files, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    cert, key = files.pair("client")
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    encrypted = tmp_path / "key"
    encrypted.touch(0o600)
    encrypted.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(SECRET.encode()),
        )
    )
    assert tls_context(cert_file=cert, key_file=encrypted, passphrase=SECRET)
    for passphrase, why, names, hint in (
        ("", "the key is encrypted", ("a", "b", "c", ""), "store it without a passphrase"),
        ("no", "the passphrase is not that of the key", ("a", "b", "c", "d"), "set d to its passphrase"),
    ):
        with pytest.raises(CAError, match=why) as caught:
            tls_context(cert_file=cert, key_file=encrypted, passphrase=passphrase, settings=names)
        assert caught.value.hint == hint
