"""Whom vminit talks to, and what it says when one end refuses the other: real servers, right and wrong."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.guest.bootstrap import bootstrap
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.errors import GuestError, InputError, Interrupted, ServerLost
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import BATCH_BYTES, join
from guest.build import copy_command, make_block, workdir_command
from guest.local import Local
from guest.pki import SERVER_NAME, Authority, Pair, Pki
from guest.server import BuildServer, group, member, piece

Names = list[x509.GeneralName]


def issue(authority: Authority, names: Names | None, common_name: str = SERVER_NAME) -> Pair:
    """A server certificate with just these alternative names."""
    pair = authority.issue(SERVER_NAME, server=True)
    template = x509.load_pem_x509_certificate(pair.cert)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = x509.CertificateBuilder(template.issuer, subject, template.public_key(), template.serial_number)
    builder = builder.not_valid_before(template.not_valid_before_utc)
    builder = builder.not_valid_after(template.not_valid_after_utc)
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(authority._key, hashes.SHA256())
    return Pair(certificate.public_bytes(serialization.Encoding.PEM), pair.key)


@pytest.fixture
def authority() -> Authority:
    return Authority("an authority")


def pki_of(authority: Authority, server: Pair) -> Pki:
    guest = authority.issue(f"guest.{SERVER_NAME}", server=False)
    return Pki(authority.pem, server, guest, Authority("a stranger"))


def refused(block: wire.BootstrapBlock, seconds: float = 5.0) -> GuestError:
    """How the guest ends, which has to be soon; it would try for half a minute."""
    stop, began = Stop(), time.monotonic()
    with pytest.raises(GuestError) as caught, join(Client(block, stop), stop, 5.0):
        pass
    stop.close()
    assert time.monotonic() - began < seconds
    assert "PRIVATE KEY" not in str(caught.value)
    return caught.value


# --- the server's name ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        None,
        [x509.DNSName("b-2.firebuild.internal")],
        [x509.RFC822Name(f"root@{SERVER_NAME}")],
        [x509.UniformResourceIdentifier(f"https://{SERVER_NAME}")],
        [x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)]))],
    ],
)
def test_a_common_name_is_no_name_of_a_server(authority: Authority, names: Names | None) -> None:
    pki = pki_of(authority, issue(authority, names))
    server = BuildServer(pki).start()
    error = refused(make_block(pki, server))
    server.stop()
    assert f"certificate is not valid for '{SERVER_NAME}'" in error.message
    assert (error.exit_status, server.calls) == (4, [])


def test_the_name_counts_among_the_alternative_names_whatever_the_common_name(authority: Authority) -> None:
    names: Names = [x509.DNSName("other.example"), x509.DNSName(SERVER_NAME)]
    pki = pki_of(authority, issue(authority, names, common_name="someone"))
    server = BuildServer(pki).start()
    stop = Stop()
    client = Client(make_block(pki, server), stop)
    with join(client, stop, 5.0) as host:
        assert list(host.steps()) == []
    client.close()
    server.stop()
    stop.close()


def test_a_server_that_shows_another_certificate_the_second_time_is_refused(authority: Authority) -> None:
    """The first connection goes to one server and all others to another, of the same CA and common name."""
    good = pki_of(authority, issue(authority, [x509.DNSName(SERVER_NAME)]))
    bad = pki_of(authority, issue(authority, None))
    bad = replace(bad, guest=good.guest)
    servers = [BuildServer(good).start(), BuildServer(bad).start()]
    with forwarding(lambda number: servers[min(number, 1)].host_port) as host_port:
        error = refused(replace(make_block(good, servers[0]), host_port=host_port))
    for server in servers:
        server.stop()
    assert error.exit_status == 4
    assert servers[1].calls == []


@contextmanager
def forwarding(choose: Callable[[int], str]) -> Iterator[str]:
    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    held: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                host, port = choose(len(held) // 2).rsplit(":", 1)
                far = socket.create_connection((host, int(port)))
                held.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        for end in held:
            end.close()


# --- the guest's certificate ----------------------------------------------------------------------


@pytest.fixture
def strange_guest(pki: Pki, server: BuildServer) -> wire.BootstrapBlock:
    pair = pki.stranger.issue(f"guest.{SERVER_NAME}", server=False)
    return replace(make_block(pki, server), cert=pair.cert.decode(), key=pair.key.decode())


def test_a_server_that_refuses_the_guest_is_believed_at_once(
    server: BuildServer, strange_guest: wire.BootstrapBlock
) -> None:
    error = refused(strange_guest)
    assert "it refuses the guest, likely" in error.message  # gRPC's core says no more to its peers
    assert (error.exit_status, server.calls) == (4, [])


@contextmanager
def tls_server(
    pki: Pki,
    tmp_path: Path,
    then: Callable[[ssl.SSLSocket], object],
    *,
    alpn: Sequence[str] = (),
    **limits: object,
) -> Iterator[str]:
    """A server that speaks TLS and does something after each handshake."""
    (tmp_path / "server.pem").write_bytes(pki.server.cert + pki.server.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    context.load_verify_locations(cadata=pki.ca.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(alpn)
    for name, value in limits.items():
        setattr(context, name, value)

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError), context.wrap_socket(plain, server_side=True) as tls:
                then(tls)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_so_it_is_with_every_version_of_tls(
    pki: Pki, tmp_path: Path, strange_guest: wire.BootstrapBlock, version: ssl.TLSVersion
) -> None:
    with tls_server(pki, tmp_path, lambda tls: None, maximum_version=version) as host_port:
        error = refused(replace(strange_guest, host_port=host_port))
    assert "refused the guest's certificate or its TLS, with the alert: unknown ca" in error.message
    assert error.exit_status == 4


def test_a_server_that_drops_the_guest_without_a_word_is_soon_given_up(
    pki: Pki, server: BuildServer, tmp_path: Path
) -> None:
    accepted: list[ssl.SSLSocket] = []
    with tls_server(pki, tmp_path, accepted.append) as host_port:
        error = refused(replace(make_block(pki, server), host_port=host_port))
    assert "closed the connection after the TLS handshake: it refuses the guest, likely" in error.message
    assert (error.exit_status, len(accepted)) == (4, 3)


def test_a_server_that_drops_connections_at_first_is_tried_again(
    pki: Pki, server: BuildServer, tmp_path: Path
) -> None:
    with (
        tls_server(pki, tmp_path, lambda tls: None) as dropping,
        forwarding(lambda number: dropping if number < 2 else server.host_port) as host_port,
    ):
        stop = Stop()
        client = Client(replace(make_block(pki, server), host_port=host_port), stop)
        with join(client, stop, 5.0) as host:
            assert list(host.steps()) == []
        client.close()
        stop.close()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (b"", "it refuses the guest, likely"),
        (b"no token at all", "the server sent something else than a token"),
        (b"0123456789abcdef0123456789ABCDEF", "the server sent something else than a token"),
    ],
)
def test_what_is_no_token_leads_nowhere(
    pki: Pki, server: BuildServer, tmp_path: Path, told: bytes, message: str
) -> None:
    def tell(tls: ssl.SSLSocket) -> None:
        assert tls.selected_alpn_protocol() == wire.CONTACT_PROTOCOL
        tls.sendall(told)

    stop = Stop()
    with tls_server(pki, tmp_path, tell, alpn=[wire.CONTACT_PROTOCOL]) as host_port:
        client = Client(replace(make_block(pki, server), host_port=host_port), stop, connect_timeout=0.5)
        with pytest.raises(ServerLost, match=message):
            join(client, stop, 5.0)
    stop.close()


def test_a_port_that_does_not_speak_tls_is_told_apart(pki: Pki, server: BuildServer) -> None:
    def speak(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"SSH-2.0-something\r\n")
            connection.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: speak(listener.accept()[0]), daemon=True).start()
        error = refused(replace(make_block(pki, server), host_port=f"127.0.0.1:{listener.getsockname()[1]}"))
    assert "the TLS handshake failed: wrong version number" in error.message
    assert error.exit_status == 4


def test_a_server_that_hangs_up_during_the_handshake_is_tried_until_the_time_is_over(
    pki: Pki, server: BuildServer
) -> None:
    def serve() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    stop = Stop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        block = replace(make_block(pki, server), host_port=f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ServerLost, match="UNAVAILABLE: "):
            join(Client(block, stop, connect_timeout=0.5), stop, 5.0)
        listener.shutdown(socket.SHUT_RDWR)
    stop.close()


def test_a_signal_ends_a_handshake_that_hangs(pki: Pki, server: BuildServer) -> None:
    stop = Stop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        block = replace(make_block(pki, server), host_port=f"127.0.0.1:{listener.getsockname()[1]}")
        threading.Timer(0.3, lambda: stop.set(Interrupted(15, "SIGTERM"))).start()
        began = time.monotonic()
        with pytest.raises(Interrupted):
            join(Client(block, stop), stop, 5.0)
    assert time.monotonic() - began < 5
    stop.close()


def test_a_key_of_another_certificate_is_wrong_metadata(
    pki: Pki, server: BuildServer, tmp_path: Path
) -> None:
    other = pki.stranger.issue("x", server=False)
    with pytest.raises(InputError, match="does not belong to the certificate") as caught:
        bootstrap(replace(make_block(pki, server), key=other.key.decode()), str(tmp_path))
    assert (caught.value.exit_status, server.calls) == (2, [])


def test_an_encrypted_key_is_wrong_metadata_and_nobody_is_asked(
    pki: Pki, server: BuildServer, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    with pytest.raises(InputError, match="Cert and Key of the Bootstrap metadata can't be used: "):
        bootstrap(replace(make_block(pki, server), key=key.decode()), str(tmp_path))


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:0", "host:99999", "host:x"])
def test_an_address_that_is_none_is_wrong_metadata(pki: Pki, server: BuildServer, address: str) -> None:
    assert refused(replace(make_block(pki, server), host_port=address)).exit_status == 2


LONG = "x" * 70  # of a label of a host name 63 bytes are allowed


@pytest.mark.parametrize(
    "names",
    [
        {"host_port": f"{LONG}.example:1"},
        {"host_port": "a..b:1"},
        {"server_name": ".example"},
        {"server_name": "a\0b"},
        {"server_name": "a..\xe4"},
    ],
)
def test_a_name_that_can_be_no_hosts_is_wrong_metadata(pki: Pki, server: BuildServer, names: Any) -> None:
    error = refused(replace(make_block(pki, server), **names))
    assert error.exit_status == 2
    assert "HostPort or ServerName of the metadata is not a host name: " in error.message


@pytest.mark.parametrize(
    ("member", "name"), [("ca_chain", "CAChain"), ("cert", "Cert and Key"), ("key", "Cert and Key")]
)
def test_credentials_that_are_none_are_named(pki: Pki, server: BuildServer, member: str, name: str) -> None:
    garbage: Any = {member: "garbage"}
    error = refused(replace(make_block(pki, server), **garbage))
    assert re.fullmatch(
        f"{name} of the Bootstrap metadata can't be used: (it is not PEM|no .*|pem .*)", error.message
    )


# --- a server that no longer answers --------------------------------------------------------------


@pytest.fixture
def silent(pki: Pki, server: BuildServer, tmp_path: Path) -> Iterator[Callable[..., ServerLost]]:
    """Runs a build with a short limit against a server that answers pings, and not everything else."""
    over = threading.Event()

    def run(*commands: wire.AnyCommand) -> ServerLost:
        (tmp_path / "image").mkdir()
        server.commands = list(commands)
        began = time.monotonic()
        block = make_block(pki, server, ping_interval=0.1)
        with pytest.raises(ServerLost) as caught:
            bootstrap(block, str(tmp_path / "image"), call_timeout=1.0)
        assert time.monotonic() - began < 15
        assert server.pings
        over.set()
        return caught.value

    run.over = over  # type: ignore[attr-defined]
    yield run
    over.set()


def test_a_host_that_takes_no_output_is_lost(local: Local) -> None:
    over = threading.Event()
    local.server.on_log = lambda message: (over.wait(20), None)[1]
    local.server.commands = [workdir_command("/w")]
    local.client.call_timeout = 0.3
    with join(local.client, local.stop, 5.0) as host, pytest.raises(ServerLost) as caught:
        while True:
            host.write(2, "stdout", bytes(BATCH_BYTES))
    assert caught.value.message == "the server did not take the output within 0.3 s"
    over.set()


@pytest.mark.root
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_host_that_stops_sending_files_is_lost(
    server: BuildServer, silent: Callable[..., ServerLost], before: int
) -> None:
    def stall(_: grpc.ServicerContext) -> Iterator[pb.ToGuest]:
        yield from [group(), piece(member("f", b"x")[:600])][:before]
        silent.over.wait(20)  # type: ignore[attr-defined]

    server.resources["files"] = stall
    error = silent(copy_command("/f"))
    assert "the server sent nothing for 1 s" in error.message
    assert error.exit_status == 4
