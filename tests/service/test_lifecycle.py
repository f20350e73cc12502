"""A server leaves nothing behind: no thread, no port, no file, no secret."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_bootstrap.errors import FirebuildError, InputError, MachineError
from firebuild_bootstrap.listening import listen, unusable_address
from firebuild_bootstrap.service import BootstrapServer, Limits
from firebuild_pki import TLSMaterial, open_authority
from support import ending_of, privately


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_after_stop_no_thread_and_no_file_is_left_and_the_port_is_free(serve: Any, short_path: Path) -> None:
    before = set(threading.enumerate())
    running = serve()
    guest = running.caller()
    guest.ping()
    guest.close()
    assert len(set(threading.enumerate()) - before) >= 3
    running.server.stop()
    own = [thread for thread in set(threading.enumerate()) - before if "channel" not in thread.name]
    for thread in own:
        thread.join(10)  # gRPC says that it has stopped from its own thread, which then ends
    assert not any(thread.is_alive() for thread in own)
    assert list(short_path.iterdir()) == []
    again = serve(listener=listen("127.0.0.1", port_of(running.address)))
    assert again.address == running.address
    again.server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(again.address)), timeout=5)
    again.server.stop()


def test_a_server_is_started_once(serve: Any) -> None:
    running = serve()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is started once"):
            running.server.start()
        running.server.stop()


def test_a_directory_that_cannot_be_used_is_an_error_in_words(serve: Any) -> None:
    with pytest.raises(MachineError, match="/dev/null: no directory can be made: Not a directory"):
        serve(runtime_directory=Path("/dev/null"))


def test_stop_with_connections_open_is_quick(serve: Any) -> None:
    running = serve(limits=Limits(handshake_timeout=60))
    running.caller().ping()
    with socket.create_connection(("127.0.0.1", port_of(running.address))) as silent:
        begun = time.monotonic()
        running.server.stop()
        assert time.monotonic() - begun < 2
        silent.settimeout(5)
        with contextlib.suppress(ConnectionResetError):  # it may not have been accepted yet
            assert silent.recv(1) == b""
    assert running.server.wait(0) is None


def test_calls_in_flight_end_before_the_server_does(serve: Any) -> None:
    entered = threading.Event()

    def slow_welcome() -> None:
        entered.set()
        time.sleep(0.4)

    running = serve(on_guest_connected=slow_welcome)
    failures: list[str] = []

    def call() -> None:
        try:
            running.caller().ping()
        except grpc.RpcError as error:
            failures.append(str(error.code()))

    calling = threading.Thread(target=call)
    calling.start()
    assert entered.wait(10)
    begun = time.monotonic()
    running.server.stop(grace=5)
    calling.join()
    assert 0.2 < time.monotonic() - begun < 4
    assert failures == ["StatusCode.FAILED_PRECONDITION"]  # an answer, not a broken connection


def test_the_answer_to_success_gets_through_although_the_server_stops_at_once(serve: Any) -> None:
    running = serve()
    stopper = threading.Thread(target=lambda: (running.outcome(), running.server.stop()))
    stopper.start()
    running.caller().success()
    stopper.join()
    assert ending_of(running.server.wait(0)) == "success"


def test_waiting_ends_when_the_server_is_stopped(serve: Any) -> None:
    running = serve()
    threading.Timer(0.1, running.server.stop).start()
    assert running.server.wait(30) is None


def test_the_inner_socket_lies_in_a_private_directory(serve: Any) -> None:
    running = serve()
    directory = Path(running.backend.removeprefix("unix:")).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_long_temporary_directory_does_not_matter(
    tmp_path: Path, materials: tuple[TLSMaterial, TLSMaterial], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with BootstrapServer(
        commands=[],
        resources={},
        server_material=materials[0],
        guest_material=materials[1],
        events=lambda event: None,
    ) as server:
        server.start()
    assert list(long.iterdir()) == []


def test_ipv6_loopback_works(serve: Any) -> None:
    running = serve(listener=listen("::1"))
    assert running.address.startswith("[::1]:")
    assert running.caller().ping() == "p"


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_host_is_an_error(host: str) -> None:
    with pytest.raises(FirebuildError, match="cannot listen on") as failed:
        listen(host)
    assert failed.value.hint == "bootstrap.bind has to name an address of this host"


@pytest.mark.root
@pytest.mark.needs("root")
def test_a_loopback_interface_that_is_down_is_told_at_once() -> None:
    script = (
        "from firebuild_bootstrap.listening import listen\n"
        "try:\n listen('127.0.0.1')\nexcept Exception as error: print(error)"
    )
    command = ["unshare", "--net", sys.executable, "-c", script]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith("the bootstrap server cannot listen on 127.0.0.1 port 0: Network is unreachable")
    assert "`ip link set lo up`" in said


def test_a_port_that_is_taken_is_an_error_that_says_how_to_find_who_has_it() -> None:
    with listen("127.0.0.1") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use") as failed:
            listen("127.0.0.1", port)
    assert (failed.value.hint or "").startswith(f"`ss -ltnp 'sport = :{port}'` shows who has the port")
    denied = unusable_address("x", PermissionError(errno.EACCES, "Permission denied"), 80, "")
    assert denied.message == "x: Permission denied"
    assert "net.ipv4.ip_unprivileged_port_start" in (denied.hint or "")


def test_material_that_tls_cannot_use_is_an_error_without_the_key(
    serve: Any, materials: tuple[TLSMaterial, TLSMaterial], short_path: Path
) -> None:
    odd = replace(materials[0], private_key_pem=b"junk")
    with pytest.raises(FirebuildError, match="cannot use its TLS material") as failed:
        serve(materials=(odd, materials[1]))
    assert "junk" not in str(failed.value)
    assert list(short_path.iterdir()) == []


def test_no_key_reaches_a_log_or_an_event(
    serve: Any, workshop: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    running = serve()
    with pytest.raises(grpc.RpcError):
        running.caller(workshop.issue("guest.b2.firebuild.internal")).success()
    guest = running.caller()
    guest.ping()
    guest.abort("no")
    running.server.stop()
    seen = caplog.text + "".join(capfd.readouterr()) + repr(running.events) + repr(running.server.__dict__)
    for material in running.materials:
        secret = material.private_key_pem.decode().splitlines()[1]
        assert secret not in seen
    assert "PRIVATE KEY" not in seen


@pytest.mark.parametrize("trust", ["root", "intermediate"])
def test_certificates_below_an_intermediate_work_whichever_of_the_two_is_trusted(
    serve: Any, workshop: Any, new_workshop: Any, trust: str
) -> None:
    middle = new_workshop("Intermediate CA", workshop)
    anchor = workshop.pem if trust == "root" else middle.pem
    server = middle.issue("b1.firebuild.internal", ExtendedKeyUsageOID.SERVER_AUTH, trust=anchor)
    running = serve(materials=(server, middle.issue("guest.b1.firebuild.internal", trust=anchor)))
    assert running.caller().ping() == "p"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_tls_versions_get_through_to_http2(serve: Any, version: ssl.TLSVersion) -> None:
    running = serve()
    material = running.materials[1]
    context = material.ssl_context()
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port_of(running.address)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=material.server_name) as secure,
    ):
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
        assert secure.recv(9)[3:4] == b"\x04"  # the server's SETTINGS
    assert running.server.refused_peers == 0


@pytest.mark.parametrize("key_type", ["p384", "rsa2048"])
def test_other_key_types_that_grpc_can_use_work_too(serve: Any, key_type: str) -> None:
    with open_authority({"key_type": key_type}, build_id="b1") as authority:
        running = serve(materials=(authority.issue_server(), authority.issue_guest()))
    assert running.caller().ping() == "p"


def test_a_listening_socket_can_be_brought_along(serve: Any) -> None:
    listener = listen("127.0.0.1", 0)
    host, port = listener.getsockname()
    running = serve(listener=listener)
    assert running.address == f"{host}:{port}"
    running.caller().ping()


@pytest.mark.root
def test_a_directory_without_room_for_a_socket_is_named(tmp_path: Path) -> None:
    def start() -> None:
        options = ["-o", "nr_inodes=2"]  # itself, and the server's directory
        subprocess.run(["mount", "-t", "tmpfs", *options, "none", tmp_path], check=True)
        with open_authority() as authority:
            server = BootstrapServer(
                commands=[],
                resources={},
                server_material=authority.issue_server(),
                guest_material=authority.issue_guest(),
                events=lambda event: None,
                runtime_directory=tmp_path,
            )
            with pytest.raises(MachineError, match=f"{tmp_path}/.*: no socket can be made: No space left"):
                server.start()
        assert list(tmp_path.iterdir()) == []

    privately(start)
