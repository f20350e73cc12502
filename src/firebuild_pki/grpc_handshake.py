"""A real gRPC call over mutual TLS between two materials, within this process.

gRPC tells a refused client nothing but "Socket closed" and writes the reason to stderr. So the
verdict is gRPC's, and the words come from the standard library's ssl, which does the handshake again.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from cryptography import x509

from firebuild_pki.chain import read_certificate
from firebuild_pki.errors import MaterialError
from firebuild_pki.material import TLSMaterial
from firebuild_pki.x509 import fingerprint


@contextmanager
def _quiet_core() -> Iterator[None]:
    # the C core looks at the variable once, when it is imported; refusals are its errors, our answers
    before = os.environ.get("GRPC_VERBOSITY")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    yield
    if before is None:
        del os.environ["GRPC_VERBOSITY"]


with _quiet_core():
    import grpc

    from firebuild_pki.grpc_credentials import channel_credentials, channel_options, server_credentials

DEFAULT_TIMEOUT = timedelta(seconds=10)
"""How long the call may take; on an idle machine it takes some milliseconds."""

_METHOD = "/firebuild.Handshake/Greet"
_GREETING = b"hello"


@dataclass(frozen=True, slots=True)
class Handshake:
    """What the two ends saw of each other.

    Args:
        server_name: the name that the guest demanded of the server, and found.
        guest_names: the DNS names in the guest's certificate, as the server saw it.
        guest_fingerprint_sha256: of that certificate, in hexadecimal.
        tls_version: as the server saw it, for example ``TLSv1.3``.
        seconds: from the start of the connection to the answer.
    """

    server_name: str
    guest_names: tuple[str, ...]
    guest_fingerprint_sha256: str
    tls_version: str
    seconds: float


def handshake(
    server: TLSMaterial,
    guest: TLSMaterial,
    *,
    timeout: timedelta = DEFAULT_TIMEOUT,
    anonymous: bool = False,
) -> Handshake:
    """Serve with one material on a loopback port, call with the other, and tell what each end saw.

    Args:
        server: material of the server; that of a guest shows that it makes no server.
        guest: material of the caller; its ``server_name`` is the name it demands.
        timeout: how long the call may take.
        anonymous: whether the guest keeps its certificate to itself.

    Raises:
        MaterialError: an end refused the other, or a material is not usable; with the reason.
    """
    peer = _Peer()
    with _serving(server, peer) as address:
        started = time.monotonic()
        try:
            _call(address, guest, timeout, anonymous)
        except grpc.RpcError as error:
            raise _failure(server, guest, timeout, anonymous, cast(grpc.Call, error)) from None
        seconds = time.monotonic() - started
    return peer.seen(guest.server_name, seconds)


class _Peer(grpc.GenericRpcHandler):
    """Answers one call and keeps who made it."""

    def __init__(self) -> None:
        self._auth: Mapping[str, Iterable[bytes]] = {}

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:  # noqa: ARG002
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._auth = cast(Any, context).auth_context()
        return request

    def seen(self, server_name: str, seconds: float) -> Handshake:
        (pem,) = self._auth["x509_pem_cert"]
        certificate = read_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (version,) = self._auth["ssl_tls_version"]
        dns_names = tuple(names.get_values_for_type(x509.DNSName))
        return Handshake(server_name, dns_names, fingerprint(certificate), version.decode(), seconds)


@contextmanager
def _serving(material: TLSMaterial, peer: _Peer) -> Iterator[str]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="handshake")
    server = grpc.server(pool)
    server.add_generic_rpc_handlers((peer,))
    try:
        try:
            port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
        except RuntimeError:
            reason = _load_problem(material) or "gRPC does not say why"
            raise MaterialError(f"gRPC cannot serve: {reason}") from None
        server.start()
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
        pool.shutdown()


def _call(address: str, material: TLSMaterial, timeout: timedelta, anonymous: bool) -> None:
    credentials = channel_credentials(material)
    if anonymous:
        credentials = grpc.ssl_channel_credentials(root_certificates=material.trust_pem)
    with grpc.secure_channel(address, credentials, channel_options(material)) as channel:
        greet: Callable[..., bytes] = cast(Any, channel.unary_unary(_METHOD))
        greet(_GREETING, timeout=timeout.total_seconds())


def _failure(
    server: TLSMaterial, guest: TLSMaterial, timeout: timedelta, anonymous: bool, call: grpc.Call
) -> MaterialError:
    who = f"the mutual TLS handshake of {server.identity} (server) and {guest.identity} (guest) failed"
    if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return MaterialError(f"{who}: no answer within {timeout.total_seconds():g} s")
    reason = _load_problem(guest) or _refusal(server, guest, anonymous)
    return MaterialError(f"{who}: {reason or f'gRPC says: {call.details()}'}")


def _load_problem(material: TLSMaterial) -> str | None:
    try:
        material.ssl_context()
    except (ssl.SSLError, ValueError) as error:
        return f"certificate, key or trust of {material.identity} cannot be used: {_words(error)}"
    return None


def _refusal(server: TLSMaterial, guest: TLSMaterial, anonymous: bool) -> str | None:
    """Do the handshake again in memory, with a library that says who refused whom, and why."""
    client = _without_certificate(guest) if anonymous else guest.ssl_context()
    to_guest, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "guest": client.wrap_bio(to_guest, to_server, server_hostname=guest.server_name),
        "server": server.ssl_context(server_side=True).wrap_bio(to_server, to_guest, server_side=True),
    }
    for end in ("guest", "server", "guest", "server"):  # two flights each, in TLS 1.3
        try:
            ends[end].do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            other = {"guest": "server", "server": "guest"}[end]
            return f"the {end} refuses the {other}: {_words(error)}"
    return None


def _without_certificate(material: TLSMaterial) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=material.trust_pem.decode())
    return context


def _words(error: ssl.SSLError | ValueError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) else str(error)
