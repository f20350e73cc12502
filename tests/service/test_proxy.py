"""The proxy by itself, between real TLS peers."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.events import Event
from firebuild_bootstrap.listening import listen
from firebuild_bootstrap.service import Limits
from firebuild_bootstrap.service import proxy as proxy_module
from firebuild_bootstrap.service.proxy import Proxy, ProxyCredentials
from firebuild_bootstrap.service.reporting import Refusals
from firebuild_bootstrap.service.server import Guard
from firebuild_bootstrap.service.session import Session
from firebuild_bootstrap.service.tls import Inspection, PeerCertificate, Pin, agreed_group, server_context
from firebuild_pki import TLSMaterial, open_authority
from firebuild_pki.grpc_credentials import server_credentials
from support import eventually, no_descriptors

Materials = tuple[TLSMaterial, TLSMaterial]


class Observer:
    """Counts the guest's connections."""

    def __init__(self, *, calls: bool = False) -> None:
        self._calls = calls
        self.opened: list[tuple[str, str]] = []
        self.groups: list[str] = []
        self.closed = threading.Semaphore(0)
        self.failed: list[FirebuildError] = []

    def connection_opened(self, name: str, peer: str, tls_version: str) -> None:
        self.opened.append((peer, tls_version))

    def keys_agreed(self, name: str, group: str) -> None:
        self.groups.append(group)

    def connection_closed(self, name: str) -> bool:
        self.closed.release()
        return self._calls

    def fail(self, error: FirebuildError) -> None:
        self.failed.append(error)


@contextmanager
def proxy(
    materials: Materials, backend: Path, observer: Observer | None = None, *, refused: int = 0
) -> Iterator[tuple[str, int]]:
    events: list[Event] = []
    opened = Proxy(
        ProxyCredentials(server=materials[0], guest=materials[1]),
        backend=str(backend),
        limits=Limits(handshake_timeout=5),
        refusals=Refusals(events.append),
        observer=observer or Observer(),
    )
    host, _, port = opened.start(listen("127.0.0.1", 0)).rpartition(":")
    try:
        yield host, int(port)
        wait_for(lambda: len(events) >= refused)  # what a peer's last bytes say is read after it has left
    finally:
        opened.stop()
    assert len(events) == refused


@contextmanager
def guest_of(materials: Materials, address: tuple[str, int]) -> Iterator[ssl.SSLSocket]:
    context = materials[1].ssl_context()
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=materials[1].server_name) as secure,
    ):
        yield secure


@contextmanager
def backend_of(material: TLSMaterial, path: Path, serve: Any) -> Iterator[None]:
    """A TLS server on a UNIX socket that hands its one connection to `serve`."""
    context = material.ssl_context(server_side=True)
    context.set_alpn_protocols(["h2"])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        plain, _ = listener.accept()
        with plain:
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    serve(secure)
            except OSError:
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        listener.close()


@pytest.mark.parametrize(
    ("error", "ends"),
    [(MemoryError(), True), (RuntimeError("can't start new thread"), True), (KeyError(), False)],
)
def test_a_host_without_memory_ends_the_build_at_once_and_a_mistake_costs_one_connection(
    materials: Materials,
    short_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    ends: bool,
) -> None:
    async def handshake(_: object) -> str:
        raise error

    monkeypatch.setattr(proxy_module, "_handshake", handshake)
    observer = Observer()
    with proxy(materials, short_path / "s", observer) as address:
        with socket.create_connection(address, timeout=10) as peer:
            peer.sendall(b"\x16")
            assert peer.recv(1) == b""
        wait_for(lambda: bool(observer.failed) is ends)
    gc.collect()
    assert [one.message[:26] for one in observer.failed] == ["no more memory or threads:"] * ends
    lost = [] if ends else [f"a connection was lost: {error!r}"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == lost


def test_bytes_go_both_ways_and_the_end_of_one_way_is_passed_on(
    materials: Materials, short_path: Path
) -> None:
    blob = os.urandom(3_000_000)
    got = bytearray()

    def answer_after_the_end(secure: ssl.SSLSocket) -> None:
        while part := secure.recv(100_000):
            got.extend(part)
        secure.sendall(blob[::-1])

    observer = Observer()
    with (
        backend_of(materials[0], short_path / "s", answer_after_the_end),
        proxy(materials, short_path / "s", observer) as address,
        guest_of(materials, address) as guest,
    ):
        guest.sendall(blob)
        # Half-close: no more from here, but everything from there.
        raw = socket.socket(fileno=os.dup(guest.fileno()))
        with raw:
            raw.shutdown(socket.SHUT_WR)
            received = bytearray()
            guest.settimeout(10)
            while part := guest.recv(100_000):
                received.extend(part)
        assert observer.closed.acquire(timeout=10)
    assert bytes(got) == blob
    assert bytes(received) == blob[::-1]
    assert observer.opened[0][1] == "TLSv1.3"


@contextmanager
def contact_of(materials: Materials, address: tuple[str, int]) -> Iterator[ssl.SSLSocket]:
    context = materials[1].ssl_context()
    context.set_alpn_protocols([wire.CONTACT_PROTOCOL, "h2"])
    with (
        socket.create_connection(address, timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=materials[1].server_name) as secure,
    ):
        yield secure


def connect_head(token: bytes) -> bytes:
    return b"CONNECT b:1 HTTP/1.1\r\nHost: b:1\r\nProxy-Authorization: Bearer " + token + b"\r\n\r\n"


async def sent_and_received(sock: socket.socket, material: TLSMaterial, blob: bytes) -> bytes:
    """Send over TLS and receive as much at the same time, in one thread: a TLS connection is not for two."""
    sock.setblocking(False)
    reader, writer = await asyncio.open_connection(
        sock=sock, ssl=material.ssl_context(), server_hostname=material.server_name
    )
    writer.write(blob)
    async with asyncio.timeout(30):
        received = await reader.readexactly(len(blob))
    writer.close()
    return received


def test_a_guest_with_the_token_of_its_contact_is_passed_through_to_the_tls_of_the_server_behind(
    materials: Materials, short_path: Path
) -> None:
    blob = os.urandom(3_000_000)
    shown: list[bytes | None] = []

    def echo(secure: ssl.SSLSocket) -> None:
        shown.append(secure.getpeercert(binary_form=True))
        left = len(blob)
        while left and (part := secure.recv(100_000)):
            left -= len(part)
            secure.sendall(part)

    observer = Observer(calls=True)
    with (
        backend_of(materials[0], short_path / "s", echo),
        proxy(materials, short_path / "s", observer) as address,
    ):
        with contact_of(materials, address) as contact:
            assert contact.selected_alpn_protocol() == wire.CONTACT_PROTOCOL
            token = contact.recv(100)
            assert contact.recv(100) == b""
        with socket.create_connection(address, timeout=10) as plain:
            head = connect_head(token)
            plain.sendall(head[:20])
            plain.sendall(head[20:])
            assert plain.recv(100) == b"HTTP/1.1 200 OK\r\n\r\n"
            received = asyncio.run(sent_and_received(plain, materials[1], blob))
        assert observer.closed.acquire(timeout=10)
    assert received == blob
    assert shown == [ssl.PEM_cert_to_DER_cert(materials[1].certificate_chain_pem.decode())]
    assert [version for _, version in observer.opened] == ["TLSv1.3"]
    assert observer.groups in (["x25519"], ["X25519MLKEM768"])  # by the version of Python's OpenSSL


def test_of_a_guest_that_does_not_know_ml_dsa_it_is_said(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_authority({"embedded": {"key_type": "ml-dsa-65"}}, build_id="b") as authority:
        ends = (authority.issue_server(), authority.issue_guest())
    context = ssl.create_default_context()  # refuses the server's CA with an alert, as a guest in Go does
    with (
        proxy(ends, short_path / "none", refused=1) as address,
        socket.create_connection(address, timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname=ends[0].server_name)
    (message,) = caplog.messages
    refused, _, new = message.partition("; ")
    assert ": it refused this server (" in refused
    assert new.startswith("ML-DSA-65 signatures are unknown to guests in Go and to gRPC before 1.85 (")


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK", b"\x16" + bytes(42), b"\x16" + bytes(80)])
def test_a_server_that_says_something_else_than_hello_has_agreed_on_no_group(data: bytes) -> None:
    assert agreed_group(data) == ""


def test_the_group_is_read_from_any_hello_of_a_server() -> None:
    head = b"\x16\x03\x03\0\x7a\x02\0\0\x76\x03\x03" + bytes(32)
    extensions = b"\0\x2b\0\x02\x03\x04" + b"\0\x33\0\x06%b\0\x02ab"
    for session in (b"", bytes(32)):
        hello = head + bytes([len(session)]) + session + b"\x13\x01\0\0\x10"
        assert agreed_group(hello + extensions % b"\x11\xec") == "X25519MLKEM768"
        assert agreed_group(hello + extensions % b"\x7f\xff") == "0x7fff"
        assert agreed_group(hello) == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (connect_head(b"0" * 32), "without the token"),
        (b"CONNECT b:1 HTTP/1.1\r\n\r\n", "without the token"),
        (b"COPY b:1 HTTP/1.1\r\n\r\n", "does not speak TLS but something else"),
        (b"C" * 5000, "does not speak TLS but something else"),
        (b"CONNECT", "does not speak TLS but something else"),
    ],
)
def test_nobody_is_passed_through_without_the_token(
    materials: Materials, short_path: Path, said: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        proxy(materials, short_path / "none", refused=1) as address,
        socket.create_connection(address, timeout=10) as plain,
    ):
        plain.sendall(said)
        plain.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert plain.recv(100) == b""
    assert reason in caplog.text


def test_whoever_comes_with_the_token_and_makes_no_call_is_told_of(
    materials: Materials, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Observer()
    with (
        backend_of(materials[0], short_path / "s", lambda secure: None),
        proxy(materials, short_path / "s", observer, refused=1) as address,
    ):
        with contact_of(materials, address) as contact:
            token = contact.recv(100)
        with socket.create_connection(address, timeout=10) as plain:
            plain.sendall(connect_head(token))
            plain.recv(100)
            plain.sendall(b"no TLS at all\r\n\r\n")
            with suppress(ConnectionResetError):
                while plain.recv(100):
                    pass
        assert observer.closed.acquire(timeout=10)
        wait_for(lambda: "made no call that is allowed" in caplog.text)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_guest_that_never_reads_is_not_listened_to_for_ever(materials: Materials, short_path: Path) -> None:
    def talk_and_listen(secure: ssl.SSLSocket) -> None:
        talking = threading.Thread(target=lambda: talk(secure))
        talking.start()
        while secure.recv(100_000):
            pass
        talking.join()

    def talk(secure: ssl.SSLSocket) -> None:
        with suppress(OSError):
            secure.sendall(bytes(32_000_000))

    with (
        backend_of(materials[0], short_path / "s", talk_and_listen),
        proxy(materials, short_path / "s") as address,
        guest_of(materials, address) as guest,
    ):
        guest.settimeout(2)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64_000_000:
                sent += guest.send(bytes(16_000))
    assert sent > 1_000_000


def test_when_the_server_side_ends_the_guest_is_closed(materials: Materials, short_path: Path) -> None:
    with (
        backend_of(materials[0], short_path / "s", lambda secure: secure.sendall(b"bye")),
        proxy(materials, short_path / "s") as address,
        guest_of(materials, address) as guest,
    ):
        assert guest.recv(10) == b"bye"
        assert guest.recv(10) == b""


def test_garbage_in_the_stream_ends_the_connection(materials: Materials, short_path: Path) -> None:
    observer = Observer()
    with (
        backend_of(materials[0], short_path / "s", lambda secure: secure.recv(10)),
        proxy(materials, short_path / "s", observer) as address,
        guest_of(materials, address) as guest,
    ):
        with socket.socket(fileno=os.dup(guest.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        assert observer.closed.acquire(timeout=10)


def test_a_backend_with_another_certificate_gets_nothing(
    materials: Materials, workshop: Any, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impostor = workshop.issue("b1.firebuild.internal", ExtendedKeyUsageOID.SERVER_AUTH)
    got: list[bytes] = []
    observer = Observer()
    with (
        backend_of(impostor, short_path / "s", lambda secure: got.append(secure.recv(100))),
        proxy(materials, short_path / "s", observer) as address,
        guest_of(materials, address) as guest,
    ):
        assert guest.recv(10) == b""
    assert [data for data in got if data] == []
    assert observer.opened == []
    assert "cannot pass" in caplog.text
    assert "not the one that was issued for this build" in caplog.text


def test_a_missing_backend_closes_the_guest_and_says_so(
    materials: Materials, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with proxy(materials, short_path / "none") as address, guest_of(materials, address) as guest:
        assert guest.recv(10) == b""
    assert "cannot pass" in caplog.text


def test_the_gate_survives_a_shortage_of_descriptors(
    materials: Materials, short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with proxy(materials, short_path / "none", refused=1) as address:
        with socket.socket() as client, no_descriptors():
            client.connect(address)
            assert eventually(lambda: "cannot accept a connection" in caplog.text)
        with guest_of(materials, address) as guest:
            assert guest.recv(10) == b""


def test_the_port_may_be_closed_while_accepting_pauses(materials: Materials, short_path: Path) -> None:
    events: list[Event] = []
    opened = Proxy(
        ProxyCredentials(server=materials[0], guest=materials[1]),
        backend=str(short_path / "none"),
        limits=Limits(),
        refusals=Refusals(events.append),
        observer=Observer(),
    )
    opened.start(listen("127.0.0.1", 0))
    opened.close_port()
    opened.close_port()
    opened._loop.call_soon_threadsafe(opened._acceptor._begin)
    opened.stop()


def test_a_key_that_grpc_cannot_use_is_refused_by_name(materials: Materials) -> None:
    key = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(FirebuildError, match=r"b1\.firebuild\.internal has a key that gRPC cannot use"):
        server_context(replace(materials[0], private_key_pem=key))


def test_nobody_passes_whose_certificate_was_not_looked_at(materials: Materials) -> None:
    inspection = Inspection(Pin(materials[1].fingerprint_sha256))
    assert inspection.problem == "its certificate was not verified"
    inspection.verified(b"an issuer", 20, 1, False)
    assert inspection.problem == "its certificate was issued by a CA that is not trusted"


@pytest.mark.parametrize("der", [b"", b"junk", b"\x30\x03\x02\x01\x05"])
def test_what_no_parser_reads_still_has_a_fingerprint(der: bytes) -> None:
    peer = PeerCertificate.of(der)
    assert peer.subject == "(no readable name)"
    assert len(peer.fingerprint) == 64


def test_an_odd_certificate_of_a_stranger_is_not_remarked_on_stderr(recwarn: pytest.WarningsRecorder) -> None:
    ca = ssl.PEM_cert_to_DER_cert(SERIAL_ZERO)
    warnings.simplefilter("always")
    assert PeerCertificate.of(ca).subject == "CN=zero"
    assert not recwarn.list


# openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=zero -set_serial 0
SERIAL_ZERO = """\
-----BEGIN CERTIFICATE-----
MIIBYDCCAQagAwIBAgIBADAKBggqhkjOPQQDAjAPMQ0wCwYDVQQDDAR6ZXJvMB4X
DTI2MTEyODA0NTQwOVoXDTI2MTIwMTA0NTQwOVowDzENMAsGA1UEAwwEemVybzBZ
MBMGByqGSM49AgEGCCqGSM49AwEHA0IABMQs0O2cv1Y44xDsGH0mbXkfikR8dfye
APnnf+hjSwFjFkNCqjKQscuoVPgzAFmMLz+fIh+yMdQ2TTCWAXgpq2CjUzBRMB0G
A1UdDgQWBBTAxt9BCnEFuxkOJ1p3nlkrvB8enTAfBgNVHSMEGDAWgBTAxt9BCnEF
uxkOJ1p3nlkrvB8enTAPBgNVHRMBAf8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUC
IQDSl7FcQkbuo6Oe7ML6Tka4iH8QCpZR/EokRSzceNKExAIge4KPptlfnHw/kuXm
N2K34AFQC0CZgY0pnvnSsAKGqPQ=
-----END CERTIFICATE-----
"""


def test_a_pin_is_read_in_any_notation(materials: Materials) -> None:
    fingerprint = materials[0].fingerprint_sha256
    colons = ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2)).upper()
    assert Pin(colons).matches(PeerCertificate("", fingerprint))
    assert not Pin(colons).matches(PeerCertificate("", "0" * 64))


def test_an_error_in_any_method_ends_the_build(materials: Materials, short_path: Path) -> None:
    def broken(request: bytes, context: grpc.ServicerContext) -> bytes:
        raise MachineError("the disk is full")

    session = Session(events=lambda event: None, limits=Limits(), on_guest_connected=lambda: None)
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool, interceptors=[Guard(Pin(materials[1].fingerprint_sha256), session)])
        handlers: dict[str, Any] = {"Break": grpc.unary_unary_rpc_method_handler(broken)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("x.X", handlers),))
        server.add_secure_port(f"unix:{short_path}/g", server_credentials(materials[0]))
        server.start()
        credentials = grpc.ssl_channel_credentials(
            materials[1].trust_pem, materials[1].private_key_pem, materials[1].certificate_chain_pem
        )
        options = [("grpc.ssl_target_name_override", materials[1].server_name)]
        with grpc.secure_channel(f"unix:{short_path}/g", credentials, options) as channel:
            call: Any = channel.unary_unary("/x.X/Break")
            with pytest.raises(grpc.RpcError, match="the disk is full"):
                call(pb.Empty().SerializeToString(), timeout=10)
        server.stop(None).wait()
    outcome = session.wait(0)
    assert outcome is not None
    assert isinstance(outcome.error, MachineError)
    session.fail(FirebuildError("a second end"))
    assert session.wait(0) is outcome
