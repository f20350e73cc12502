"""Every peer that is turned away is named with reason, subject and fingerprint, and reaches no handler."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.events import GuestConnected, Notice, PeerRefused
from firebuild_bootstrap.guest.client import Client
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.legacy.old_server import OldServer
from firebuild_bootstrap.service import Limits
from firebuild_pki import TLSMaterial

STRANGER = "guest.b2.firebuild.internal"
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def strangers() -> dict[str, tuple[Callable[[Any, Any], TLSMaterial], str]]:
    """Who knocks, and a part of the reason for which it is refused."""
    hour = timedelta(hours=1)
    return {
        "the guest of another build of the same CA": (
            lambda workshop, new: workshop.issue(STRANGER),
            "not the one that was issued for this build",
        ),
        "a second certificate with the guest's own name": (
            lambda workshop, new: workshop.issue("guest.b1.firebuild.internal"),
            "not the one that was issued for this build",
        ),
        "a guest of another CA": (
            lambda workshop, new: new("Other CA").issue(STRANGER, trust=workshop.pem),
            "issued by a CA that is not trusted",
        ),
        "a guest of a CA that only has the same name": (
            lambda workshop, new: new().issue(STRANGER, trust=workshop.pem),
            "certificate",
        ),
        "an expired guest": (
            lambda workshop, new: workshop.issue(STRANGER, start=-2 * hour, lifetime=hour),
            "has expired",
        ),
        "a guest from the future": (
            lambda workshop, new: workshop.issue(STRANGER, start=hour),
            "is not valid yet",
        ),
        "a server of the same CA": (
            lambda workshop, new: workshop.issue("b2.firebuild.internal", SERVER_AUTH),
            "not meant for TLS clients",
        ),
        "a guest below an expired intermediate": (
            lambda workshop, new: new("Old intermediate", workshop, days=-1).issue(STRANGER),
            "has expired",
        ),
        "a guest that presents its chain with an unknown root": (
            lambda workshop, new: new("Mid", new("Far root")).issue(STRANGER, trust=workshop.pem),
            "issued by a CA that is not trusted",
        ),
    }


@pytest.mark.parametrize("who", strangers())
def test_a_stranger_is_named_and_reaches_no_handler(
    who: str, serve: Any, workshop: Any, new_workshop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = strangers()[who]
    material = make(workshop, new_workshop)
    running = serve()
    with pytest.raises(grpc.RpcError) as refused:
        running.caller(material).success()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    event = running.refusal()
    assert reason in event.reason
    assert event.subject == f"CN={material.identity}"
    assert event.fingerprint_sha256 == material.fingerprint_sha256
    assert event.peer.startswith("127.0.0.1:")
    (record,) = [r for r in caplog.records if r.name == "firebuild.service"]
    assert record.levelno == logging.WARNING
    for part in (event.peer, event.reason, event.subject, event.fingerprint_sha256):
        assert part in record.getMessage()


def test_a_stranger_gets_no_token(serve: Any, workshop: Any) -> None:
    running = serve()
    stranger = workshop.issue(STRANGER)
    context = stranger.ssl_context()
    context.set_alpn_protocols([wire.CONTACT_PROTOCOL])
    with (
        pytest.raises(ssl.SSLError, match=r"(?i)alert"),
        socket.create_connection(host_and_port(running.address), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=stranger.server_name) as secure,
    ):
        secure.recv(100)
    event = running.refusal()
    assert "not the one that was issued for this build" in event.reason
    assert (event.subject, event.fingerprint_sha256) == (f"CN={STRANGER}", stranger.fingerprint_sha256)


def test_our_own_guest_has_its_bytes_passed_through_and_says_nothing_in_plain_text(
    serve: Any,
) -> None:
    running = serve()
    material = running.materials[1]
    heard: list[bytearray] = []

    def pass_on() -> None:
        """Stand between both, one connection after the other, and listen to what the guest says."""
        with contextlib.suppress(OSError):
            while True:
                with (
                    listener.accept()[0] as near,
                    socket.create_connection(host_and_port(running.address), timeout=10) as far,
                ):
                    heard.append(bytearray())
                    back = threading.Thread(target=copy, args=(far, near))
                    back.start()
                    copy(near, far, heard[-1])
                    back.join()

    def copy(source: socket.socket, target: socket.socket, told: bytearray | None = None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if told is not None:
                    told += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    stop = Stop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        between = threading.Thread(target=pass_on)
        between.start()
        block = wire.BootstrapBlock(
            host_port=f"127.0.0.1:{listener.getsockname()[1]}",
            ca_chain=material.trust_pem.decode(),
            cert=material.certificate_chain_pem.decode(),
            key=material.private_key_pem.decode(),
            server_name=material.server_name,
        )
        client = Client(block, stop)
        with OldServer(client, stop, 5.0) as host:
            assert host.ping("p", 10)
        client.close()
        listener.shutdown(socket.SHUT_RDWR)
        between.join()
    stop.close()
    contact, passed = map(bytes, heard)
    head, _, rest = passed.partition(b"\r\n\r\n")
    assert head.startswith(b"CONNECT 127.0.0.1:")
    assert contact[:2] == rest[:2] == b"\x16\x03"  # TLS handshakes (RFC 8446, section 5.1)
    assert [event.tls_version for event in running.of(GuestConnected)] == ["TLSv1.3"]
    assert running.server.refused_peers == 0


def token_of(running: Any) -> str:
    context = running.materials[1].ssl_context()
    context.set_alpn_protocols([wire.CONTACT_PROTOCOL])
    with (
        socket.create_connection(host_and_port(running.address), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=running.materials[1].server_name) as secure,
    ):
        return str(secure.recv(100).decode())


def test_a_stranger_that_has_listened_to_the_token_is_named_by_the_server_behind(
    serve: Any, workshop: Any
) -> None:
    running = serve()
    stranger = workshop.issue(STRANGER)
    with pytest.raises(grpc.RpcError) as refused:
        running.caller(stranger, token=token_of(running)).success()
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    for caller in running._callers:
        caller.close()
    event = running.refusal()
    assert event.peer.startswith("127.0.0.1:")
    assert (event.subject, event.fingerprint_sha256) == (f"CN={STRANGER}", stranger.fingerprint_sha256)


def test_a_stranger_of_another_ca_that_has_listened_to_the_token_is_told_of(
    serve: Any, workshop: Any, new_workshop: Any
) -> None:
    running = serve()
    stranger = new_workshop("Other CA").issue(STRANGER, trust=workshop.pem)
    with pytest.raises(grpc.RpcError):
        running.caller(stranger, token=token_of(running)).success()
    assert "made no call that is allowed" in running.refusal().reason


def test_the_servers_own_certificate_does_not_make_a_client(serve: Any) -> None:
    running = serve()
    server_material = running.materials[0]
    with pytest.raises(grpc.RpcError):
        running.caller(server_material).success()
    event = running.refusal()
    assert "not meant for TLS clients" in event.reason
    assert event.fingerprint_sha256 == server_material.fingerprint_sha256


def client_context(material: TLSMaterial, *, certificate: bool, alpn: str = "h2") -> ssl.SSLContext:
    if certificate:
        context = material.ssl_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=material.trust_pem.decode())
    context.set_alpn_protocols([alpn])
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_peer_without_certificate_is_refused(serve: Any, version: ssl.TLSVersion) -> None:
    running = serve()
    context = client_context(running.materials[1], certificate=False)
    context.minimum_version = context.maximum_version = version
    with (
        pytest.raises(ssl.SSLError, match=r"(?i)certificate.required|handshake.failure"),
        socket.create_connection(host_and_port(running.address), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=running.materials[1].server_name) as secure,
    ):
        secure.recv(1)
    event = running.refusal()
    assert event.reason == "it presented no certificate"
    assert (event.subject, event.fingerprint_sha256) == ("", "")


def test_the_guest_has_to_offer_http2(serve: Any) -> None:
    running = serve()
    context = client_context(running.materials[1], certificate=True, alpn="http/1.1")
    with (
        socket.create_connection(host_and_port(running.address), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=running.materials[1].server_name) as secure,
    ):
        assert secure.recv(1) == b""
    assert "HTTP/2" in running.refusal().reason


def test_plaintext_http2_is_refused(serve: Any) -> None:
    running = serve()
    with grpc.insecure_channel(running.address) as channel:
        success: Any = channel.unary_unary(wire.method("Success"))
        with pytest.raises(grpc.RpcError):
            success(pb.Empty().SerializeToString(), timeout=10)
    events = running.of(PeerRefused)
    assert events
    assert {event.reason for event in events} == {"it does not speak TLS but plaintext HTTP/2"}
    assert running.server.wait(0) is None
    assert running.welcomed == []


def test_other_plaintext_is_refused(serve: Any) -> None:
    running = serve()
    with socket.create_connection(host_and_port(running.address), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(100)
    assert running.refusal().reason == "it does not speak TLS but something else"


def test_tls_1_1_is_refused(serve: Any) -> None:
    running = serve()
    command = ["openssl", "s_client", "-connect", running.address, "-tls1_1"]
    done = subprocess.run(
        [*command, "-cipher", "DEFAULT:@SECLEVEL=0"], input=b"", capture_output=True, check=False, timeout=30
    )
    assert b"protocol version" in done.stderr
    assert running.refusal().reason == "it offers no TLS version from 1.2 on"


def test_a_peer_that_hangs_up_is_refused(serve: Any) -> None:
    running = serve()
    socket.create_connection(host_and_port(running.address), timeout=10).close()
    assert running.refusal().reason == "it closed the connection without a TLS handshake"


def test_a_peer_that_dawdles_is_refused(serve: Any) -> None:
    running = serve(limits=Limits(handshake_timeout=0.2))
    with socket.create_connection(host_and_port(running.address), timeout=10) as plain:
        assert plain.recv(1) == b""
    assert running.refusal().reason == "its TLS handshake took longer than 0.2 seconds"


def test_a_grpc_client_that_does_not_trust_this_server_is_named_too(serve: Any, new_workshop: Any) -> None:
    running = serve()
    stranger = new_workshop("Other CA").issue(STRANGER)
    with pytest.raises(grpc.RpcError):
        running.caller(stranger).success()
    assert "perhaps it does not trust this server" in running.refusal().reason


def test_the_alert_of_a_client_that_does_not_trust_this_server_is_told(serve: Any, new_workshop: Any) -> None:
    running = serve()
    context = client_context(new_workshop("Other CA").issue(STRANGER), certificate=True)
    with (
        socket.create_connection(host_and_port(running.address), timeout=10) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname=running.materials[1].server_name)
    assert running.refusal().reason == "it refused this server (tlsv1 alert unknown ca)"


def test_peers_that_hold_connections_open_cannot_keep_the_guest_out(serve: Any) -> None:
    running = serve(limits=Limits(max_connections=2, max_handshakes=3, handshake_timeout=30))
    target = host_and_port(running.address)
    with contextlib.ExitStack() as held:
        peers = [held.enter_context(socket.create_connection(target, timeout=10)) for _ in range(4)]
        assert peers[0].recv(1) == b""
        assert running.refusal().reason == "its TLS handshake gave way to newer ones"
        guest = running.caller()
        assert guest.ping() == "p"  # now it is the second peer that had to go
        assert peers[1].recv(1) == b""
        for _ in range(20):
            held.enter_context(socket.create_connection(target, timeout=10))
        assert guest.ping("still there") == "still there"


def test_the_default_limits_bear_a_crowd_of_silent_peers(serve: Any) -> None:
    running = serve()
    target = host_and_port(running.address)
    with contextlib.ExitStack() as held:
        for _ in range(300):
            held.enter_context(socket.create_connection(target, timeout=10))
        assert running.caller().ping() == "p"
        named = running.of(PeerRefused)
        assert running.server.refused_peers > len(named) == 50
        (notice,) = running.of(Notice)
        assert notice.message == "50 peers were refused; further ones are counted, not named"


def test_the_guest_cannot_have_more_connections_than_the_limit(serve: Any) -> None:
    running = serve(limits=Limits(max_connections=1))
    guest = running.caller()
    assert guest.ping() == "p"
    with pytest.raises(grpc.RpcError):
        running.caller().ping()
    assert any("the guest has 1 connection open" in event.reason for event in running.of(PeerRefused))
    assert guest.ping() == "p"


def test_a_subject_cannot_forge_a_log_line(
    serve: Any, workshop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve()
    forged = workshop.issue(STRANGER, subject="a\nWARNING all is well \x1b[2J")
    with pytest.raises(grpc.RpcError):
        running.caller(forged).success()
    event = running.refusal()
    assert event.subject.isprintable()
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_certificate_without_subject_is_named_by_its_names(serve: Any, workshop: Any) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError):
        running.caller(workshop.issue(STRANGER, subject="")).success()
    assert running.refusal().subject == f"DNS={STRANGER}"


@pytest.mark.parametrize("name", ["Success", "Commands", "NoSuchMethod"])
def test_behind_the_gate_every_call_is_checked_again(serve: Any, workshop: Any, name: str) -> None:
    running = serve()
    stranger = workshop.issue(STRANGER)
    with pytest.raises(grpc.RpcError) as refused:
        running.caller(stranger, inner=True).unary(name, pb.Empty())
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    event = running.refusal()
    assert event.subject == f"CN={STRANGER}"
    assert event.fingerprint_sha256 == stranger.fingerprint_sha256


def test_behind_the_gate_a_stranger_gets_no_stream(serve: Any, workshop: Any) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError) as refused:
        list(running.caller(workshop.issue(STRANGER), inner=True).resource("step-2"))
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    running.refusal()


def test_behind_the_gate_a_client_without_certificate_gets_nowhere(serve: Any) -> None:
    running = serve()
    material = running.materials[1]
    credentials = grpc.ssl_channel_credentials(root_certificates=material.trust_pem)
    options = [("grpc.ssl_target_name_override", material.server_name)]
    with grpc.secure_channel(running.backend, credentials, options) as channel:
        success: Any = channel.unary_unary(wire.method("Success"))
        with pytest.raises(grpc.RpcError):
            success(b"", timeout=5)
    assert running.server.wait(0) is None
    assert running.welcomed == []


def test_the_guest_learns_that_a_method_does_not_exist(serve: Any) -> None:
    running = serve()
    with pytest.raises(grpc.RpcError) as refused:
        running.caller().unary("NoSuchMethod", pb.Empty())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
