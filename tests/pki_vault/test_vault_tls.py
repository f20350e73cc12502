"""The connection to Vault: what is trusted, which name, which client certificate."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from baoserver.process import free_port
from firebuild_pki import CAError, ProviderError
from firebuild_pki.keys import generate_key
from pki.tools import OperatorCA, pem
from pki_vault.scripted import Reply, scripted
from pki_vault.tools import Backend, ClientCertificate, raises

pytestmark = pytest.mark.needs("bao")

QUICK: dict[str, Any] = {"retry_for": "0s"}


def test_the_ca_in_the_settings_is_what_counts(tls_backend: Backend, tmp_path: Path) -> None:
    with tls_backend.open() as authority:
        assert authority.issue_server()
    other = tmp_path / "other.pem"
    other.write_bytes(OperatorCA().pem)
    for tls in ({"ca_file": str(other)}, {}):  # another CA, and those of the system
        with raises(ProviderError, "its TLS certificate is not accepted", "set tls.ca_file") as caught:
            tls_backend.open(tls=tls)
        assert "given up after" not in str(caught.value)


def test_the_name_in_the_settings_is_really_checked(tls_backend: Backend) -> None:
    ca_file = str(tls_backend.api.ca_file)
    with tls_backend.open(tls={"ca_file": ca_file, "server_name": "localhost"}) as authority:
        assert authority.issue_server()
    with raises(ProviderError, "its TLS certificate is not accepted: hostname mismatch", "tls.server_name"):
        tls_backend.open(tls={"ca_file": ca_file, "server_name": "vault.example"})


def test_plain_http_where_tls_is_expected_and_the_other_way_round(
    backend: Backend, tls_backend: Backend
) -> None:
    with raises(ProviderError, "it does not speak TLS", "is it plain http, or another service?"):
        backend.open(address=backend.api.address.replace("http:", "https:"))
    plain = tls_backend.api.address.replace("https:", "http:")
    with raises(ProviderError, "speaks TLS, not plain http", f"use {tls_backend.api.address}"):
        tls_backend.open(address=plain, tls=None)


def test_a_server_that_hangs_up_on_plain_http_is_told_from_one_that_is_down(
    tls_backend: Backend, tmp_path: Path
) -> None:
    # As HashiCorp Vault: it reads what is no ClientHello and resets the connection, without a word.
    own = ClientCertificate.written(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own.cert_file, own.key_file)
    with socket.create_server(("127.0.0.1", 0)) as listener, closing_thread(listener, context):
        port = listener.getsockname()[1]
        with raises(ProviderError, "this port speaks TLS, not plain http", f"use https://127.0.0.1:{port}"):
            tls_backend.open(address=f"http://127.0.0.1:{port}", tls=None, retry_for="30s")


def test_a_server_that_hangs_up_on_everybody_is_not_taken_for_tls(tls_backend: Backend) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, closing_thread(listener, None):
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with raises(ProviderError, address):
            tls_backend.open(address=address, tls=None, retry_for="0s")


@contextlib.contextmanager
def closing_thread(listener: socket.socket, context: ssl.SSLContext | None) -> Iterator[None]:
    """Hang up on whoever calls; with a context, on those that do not begin with TLS."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_a_name_that_nobody_knows_is_not_asked_for_twice(backend: Backend) -> None:
    with raises(ProviderError, "https://vault.invalid: its name", "address") as caught:
        backend.open(address="https://vault.invalid", **QUICK)
    assert caught.value.provider == "vault"  # type: ignore[attr-defined]


Break = Callable[[ClientCertificate, Path], dict[str, Any]]

FILES: dict[str, tuple[Break, str, str]] = {
    "no CA file": (lambda own, tmp: {"ca_file": str(tmp / "none")}, "none: No such file", ""),
    "no certificates": (lambda own, tmp: {"ca_file": str(own.key_file)}, "expected PEM certificates", ""),
    "an empty CA file": (lambda own, tmp: {"ca_file": _file(tmp, b"")}, "expected PEM certificates", ""),
    "binary": (
        lambda own, tmp: {"ca_file": _file(tmp, b"\xff\xfe")},
        "expected PEM certificates in tls.ca_file",
        "",
    ),
    "no key file": (
        lambda own, tmp: {"key_file": str(tmp / "none")},
        "cannot read tls.key_file ",
        "",
    ),
    "no certificate": (lambda own, tmp: {"cert_file": str(tmp / "none")}, "No such file", ""),
    "another key": (
        lambda own, tmp: {"key_file": _key(tmp)},
        "cannot be used: key values mismatch",
        "tls.cert_file",
    ),
    "an encrypted key": (
        lambda own, tmp: {"key_file": _key(tmp, b"sesame")},
        "cannot be used",
        "tls.key_passphrase",
    ),
    "an open key": (
        lambda own, tmp: {"key_file": _key(tmp, mode=0o644)},
        "open to every user (mode 0644)",
        "chmod",
    ),
    "no PEM": (lambda own, tmp: {"cert_file": _file(tmp, b"no")}, "cannot be used", "tls.cert_file"),
}


def _file(directory: Path, content: bytes) -> str:
    file = directory / "file"
    file.write_bytes(content)
    return str(file)


def _key(directory: Path, passphrase: bytes | None = None, *, mode: int = 0o600, key: Any = None) -> str:
    encryption: Any = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase)
    pkcs8 = serialization.PrivateFormat.PKCS8
    file = directory / "other.key"
    file.write_bytes((key or generate_key()).private_bytes(serialization.Encoding.PEM, pkcs8, encryption))
    file.chmod(mode)
    return str(file)


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_used_are_named(case: str, tls_backend: Backend, tmp_path: Path) -> None:
    change, words, hint = FILES[case]
    own = ClientCertificate.written(tmp_path)
    tls = {**own.block(tls_backend), **change(own, tmp_path)}
    with raises(CAError, "ca-provider(vault): ", words, hint):
        tls_backend.open(tls=tls)


def test_an_encrypted_key_opens_with_its_passphrase(tls_backend: Backend, tmp_path: Path) -> None:
    own = ClientCertificate.written(tmp_path)
    plain = serialization.load_pem_private_key(own.key_file.read_bytes(), None)
    encrypted = _key(tmp_path, b"open sesame", key=plain)
    tls = {**own.block(tls_backend), "key_file": encrypted, "key_passphrase": {"env": "PASSPHRASE"}}
    environ = {**tls_backend.environ, "PASSPHRASE": "open sesame"}
    with tls_backend.open(tls=tls, environ=environ) as authority:
        assert authority.issue_server()
    with raises(CAError, "cannot be used", "tls.key_passphrase") as caught:
        tls_backend.open(tls=tls, environ={**environ, "PASSPHRASE": "not sesame"})
    assert "not sesame" not in str(caught.value)


@pytest.fixture
def demanding(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a server that insists on certificates that nobody has; and the block `tls`."""
    now = datetime.now(UTC)
    valid = (now - timedelta(hours=1), now + timedelta(hours=1))
    ca, key = OperatorCA(valid=valid), generate_key()
    (tmp_path / "server.pem").write_bytes(pem(ca.leaf(key.public_key(), ["localhost"], valid=valid)))
    (tmp_path / "trust.pem").write_bytes(ca.pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=OperatorCA().pem.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # in 1.3 the refusal races with the request
    context.load_cert_chain(tmp_path / "server.pem", _key(tmp_path, key=key))
    with scripted(Reply(204)) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        address = server.address.replace("http://127.0.0.1", "https://localhost")
        yield address, {"ca_file": str(tmp_path / "trust.pem")}


def test_a_server_that_wants_a_client_certificate_says_so(
    demanding: tuple[str, dict[str, str]], backend: Backend
) -> None:
    address, tls = demanding
    with raises(ProviderError, f"{address}: it refused the TLS connection: ", "set tls.cert_file"):
        backend.open(address=address, tls=tls)


def test_a_closed_port_is_named(backend: Backend) -> None:
    closed = f"https://127.0.0.1:{free_port()}"
    with raises(ProviderError, f"{closed}: connection refused (given up after 0 s)"):
        backend.open(address=closed, **QUICK)
