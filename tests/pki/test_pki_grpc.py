"""Material in real gRPC handshakes: the right peer gets in, all others stay out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import grpc
import pytest

from firebuild_pki import KeyType, MaterialError, TLSMaterial, grpc_handshake, open_authority
from firebuild_pki.grpc_credentials import channel_credentials, channel_options, server_credentials


class Echo(grpc.GenericRpcHandler):
    """Answers every call with its request and who sent it."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            auth: Mapping[str, Iterable[bytes]] = cast(Any, context.auth_context())
            names = auth["x509_subject_alternative_name"]
            return request + b" from " + b",".join(names)

        return grpc.unary_unary_rpc_method_handler(answer)


@contextmanager
def serving(material: TLSMaterial) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def call(address: str, credentials: grpc.ChannelCredentials, material: TLSMaterial) -> bytes:
    with grpc.secure_channel(address, credentials, channel_options(material)) as channel:
        echo: Callable[..., bytes] = cast(Any, channel.unary_unary("/test.Echo/Echo"))
        return echo(b"hello", timeout=10)


@pytest.mark.parametrize("key_type", KeyType)
def test_server_and_guest_of_one_authority_talk(key_type: KeyType) -> None:
    with open_authority({"key_type": key_type}, build_id="demo") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    with serving(server) as address:
        reply = call(address, channel_credentials(guest), guest)
    assert reply == b"hello from guest.demo.firebuild.internal"


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[TLSMaterial, TLSMaterial, TLSMaterial]]:
    """The server and guest of one authority, the guest of another with the same names."""
    with open_authority(build_id="demo") as authority, open_authority(build_id="demo") as other:
        yield authority.issue_server(), authority.issue_guest(), other.issue_guest()


def refused(address: str, credentials: grpc.ChannelCredentials, material: TLSMaterial) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        call(address, credentials, material)
    return bool(caught.value.code() is grpc.StatusCode.UNAVAILABLE)


Ends = tuple[TLSMaterial, TLSMaterial, TLSMaterial]


def test_a_client_without_certificate_is_refused(ends: Ends) -> None:
    server, guest, _ = ends
    with serving(server) as address:
        anonymous = grpc.ssl_channel_credentials(root_certificates=guest.trust_pem)
        assert refused(address, anonymous, guest)


def test_a_client_of_another_authority_is_refused(ends: Ends) -> None:
    server, guest, stranger = ends
    credentials = grpc.ssl_channel_credentials(
        guest.trust_pem, stranger.private_key_pem, stranger.certificate_chain_pem
    )
    with serving(server) as address:
        assert refused(address, credentials, guest)


def test_the_servers_own_certificate_does_not_make_a_client(ends: Ends) -> None:
    server, guest, _ = ends
    with serving(server) as address:
        assert refused(address, channel_credentials(server), guest)


def test_the_guests_certificate_does_not_make_a_server(ends: Ends) -> None:
    _, guest, _ = ends
    with serving(guest) as address:
        assert refused(address, channel_credentials(guest), guest)


def test_a_server_of_another_authority_is_refused(ends: Ends) -> None:
    server, _, stranger = ends
    with serving(server) as address:
        assert refused(address, channel_credentials(stranger), stranger)


def test_a_server_of_another_build_is_refused() -> None:
    with open_authority(build_id="one") as authority, open_authority(build_id="two") as other:
        server, guest = authority.issue_server(), authority.issue_guest()
        elsewhere = other.issue_guest()
    with serving(server) as address:
        assert refused(address, channel_credentials(guest), elsewhere)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_handshake_ends_though_no_thread_can_be_started_for_its_server(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(ThreadPoolExecutor):
        def submit(self, *_: object, **__: object) -> Any:
            raise RuntimeError("can't start new thread")  # gRPC's own thread ends with it

    monkeypatch.setattr(grpc_handshake, "ThreadPoolExecutor", Full)
    with pytest.raises(MaterialError, match="no answer within 1 s"):
        grpc_handshake.handshake(*ends[:2], timeout=timedelta(seconds=1))
