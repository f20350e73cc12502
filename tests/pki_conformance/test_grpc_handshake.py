"""A gRPC call between two materials: what both ends saw, or who refused whom and why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest

from firebuild_pki import MaterialError, TLSMaterial, open_authority
from firebuild_pki.grpc_handshake import Handshake, handshake

Ends = tuple[TLSMaterial, TLSMaterial, TLSMaterial, TLSMaterial]


@pytest.fixture(scope="module")
def ends() -> Ends:
    """Server and guest of a build, and those of another CA with the same names."""
    with open_authority(build_id="b") as one, open_authority(build_id="b") as other:
        return one.issue_server(), one.issue_guest(), other.issue_server(), other.issue_guest()


def refusal(server: TLSMaterial, guest: TLSMaterial, *, anonymous: bool = False) -> str:
    with pytest.raises(MaterialError) as caught:
        handshake(server, guest, anonymous=anonymous)
    return str(caught.value).split(" failed: ", 1)[-1]


def test_each_end_sees_the_other(ends: Ends) -> None:
    server, guest, *_ = ends
    seen = handshake(server, guest)
    assert 0 < seen.seconds < 10
    assert seen == Handshake(
        server_name="b.firebuild.internal",
        guest_names=("guest.b.firebuild.internal",),
        guest_fingerprint_sha256=guest.fingerprint_sha256,
        tls_version="TLSv1.3",
        seconds=seen.seconds,
        group="X25519MLKEM768",
        signatures=("ECDSA with SHA-256", "ECDSA with SHA-256"),
    )


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_no_proxy_is_asked_for_the_way_to_this_host(
    variable: str, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:1")  # where nobody listens
    server, guest, *_ = ends
    assert handshake(server, guest).server_name == "b.firebuild.internal"


def test_a_refusal_names_both_ends(ends: Ends) -> None:
    server, *_ = ends
    with pytest.raises(MaterialError) as caught:
        handshake(server, server)
    assert str(caught.value) == (
        "the mutual TLS handshake of b.firebuild.internal (server) and b.firebuild.internal (guest) failed: "
        "the server refuses the guest: unsuitable certificate purpose"
    )


def test_refusals_say_who_and_why(ends: Ends) -> None:
    server, guest, other_server, other_guest = ends
    stranger = replace(
        guest,
        private_key_pem=other_guest.private_key_pem,
        certificate_chain_pem=other_guest.certificate_chain_pem,
    )
    by_server, by_guest = "the server refuses the guest: ", "the guest refuses the server: "
    unknown = "unable to get local issuer certificate"
    assert refusal(guest, replace(guest, server_name=guest.identity)) == (
        f"{by_guest}unsuitable certificate purpose"
    )
    assert refusal(server, guest, anonymous=True) == f"{by_server}peer did not return a certificate"
    assert refusal(other_server, guest, anonymous=True) == f"{by_guest}{unknown}"
    assert refusal(server, stranger) == f"{by_server}{unknown}"
    assert refusal(other_server, guest) == f"{by_guest}{unknown}"
    assert refusal(server, replace(guest, server_name="o.x")) == (
        f"{by_guest}Hostname mismatch, certificate is not valid for 'o.x'."
    )


def test_material_that_cannot_be_used_is_named(ends: Ends) -> None:
    server, guest, *_ = ends
    mixed = replace(server, private_key_pem=guest.private_key_pem)
    assert refusal(mixed, guest) == (
        "gRPC cannot serve: certificate, key or trust of b.firebuild.internal cannot be used: "
        "key values mismatch"
    )
    unusable = "certificate, key or trust of guest.b.firebuild.internal cannot be used: "
    assert refusal(server, replace(guest, private_key_pem=server.private_key_pem)) == (
        f"{unusable}key values mismatch"
    )
    assert refusal(server, replace(guest, trust_pem=b"junk")).startswith(f"{unusable}no start line")
    assert refusal(server, replace(guest, private_key_pem=b"junk")).startswith(unusable)


def test_a_server_that_grpc_alone_refuses_is_an_error(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpc._server._Server.add_secure_port", _fail)
    assert refusal(ends[0], ends[1]) == "gRPC cannot serve: gRPC does not say why"


def _fail(*_arguments: object) -> int:
    raise RuntimeError("Failed to bind")


def test_a_refusal_that_ssl_does_not_share_is_in_the_words_of_grpc(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refused(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNAVAILABLE

        def details(self) -> str:
            return "not today"

    def refuse(*_arguments: object) -> None:
        raise Refused

    monkeypatch.setattr("firebuild_pki.grpc_handshake._call", refuse)
    server, guest, *_ = ends
    assert refusal(server, guest) == "gRPC says: not today"


def test_an_answer_is_not_waited_for_longer_than_allowed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(self: object, request: bytes, context: object) -> bytes:
        time.sleep(0.6)
        return request

    monkeypatch.setattr("firebuild_pki.grpc_handshake._Peer._answer", sleep)
    with pytest.raises(MaterialError, match=r"failed: no answer within 0\.2 s"):
        handshake(ends[0], ends[1], timeout=timedelta(milliseconds=200))


def test_nothing_is_left_behind(ends: Ends) -> None:
    server, guest, *_ = ends
    handshake(server, guest)  # gRPC keeps a few descriptors for the life of the process
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        handshake(server, guest)
        refusal(server, server)
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    assert not [one for one in threading.enumerate() if one.name.startswith("handshake")]


PROGRAM = """
import os
from firebuild_pki import MaterialError, open_authority
from firebuild_pki.grpc_handshake import handshake
with open_authority() as authority:
    server = authority.issue_server()
try:
    handshake(server, server)
except MaterialError:
    print(os.environ.get("GRPC_VERBOSITY"))
"""


@pytest.mark.parametrize(("verbosity", "quiet"), [(None, True), ("INFO", False)])
def test_the_core_of_grpc_is_quiet_unless_asked_to_speak(verbosity: str | None, quiet: bool) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    if verbosity is not None:
        environ["GRPC_VERBOSITY"] = verbosity
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout == f"{verbosity}\n"
    assert (done.stderr == "") is quiet
