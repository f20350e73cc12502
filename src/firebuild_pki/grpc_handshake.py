"""A real gRPC call over mutual TLS between two materials, within this process.

gRPC tells a refused client nothing but "Socket closed" and writes the reason to stderr. So the
verdict is gRPC's, and the words come from OpenSSL, which does the handshake again: that of the standard
library's ssl, or, where that is too old for ML-DSA, that of cryptography.
"""

from __future__ import annotations

import os
import resource
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from firebuild_pki.chain import parse_certificates, read_certificate, signed_with
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.material import TLSMaterial
from firebuild_pki.values import dataclass
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

    from firebuild_pki.grpc_credentials import (
        GUEST_CHAIN_HINT,
        channel_credentials,
        channel_options,
        guest_chain_problem,
        server_credentials,
    )

DEFAULT_TIMEOUT = timedelta(seconds=10)
"""How long the call may take; on an idle machine it takes some milliseconds."""

_ADDRESS_SPACE = 1 << 30
"""Bytes of addresses that a process needs for both ends. With less (up to 600 MiB with gRPC 1.85) the core
aborts it without a word, or a thread can't be started, now and then."""

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
        group: in which the server exchanges keys with a client that knows all it may ask for, by its name in
            OpenSSL: ``X25519MLKEM768`` is safe from quantum computers. gRPC does not tell its own.
        signatures: what the certificates of the server's chain are signed with, leaf first.
    """

    server_name: str
    guest_names: tuple[str, ...]
    guest_fingerprint_sha256: str
    tls_version: str
    seconds: float
    group: str = ""
    signatures: tuple[str, ...] = ()


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
        CAError: this process may have too few addresses for gRPC.
    """
    _check_address_space()
    peer = _Peer()
    with _serving(server, peer, timeout) as address:
        started = time.monotonic()
        try:
            _call(address, guest, timeout, anonymous)
        except grpc.RpcError as error:
            raise _failure(server, guest, timeout, anonymous, cast(grpc.Call, error)) from None
        seconds = time.monotonic() - started
        group = _group(address, guest, timeout)
    chain = parse_certificates(server.certificate_chain_pem, "certificate chain")
    signatures = tuple(signed_with(one) for one in chain)
    return replace(peer.seen(guest.server_name, seconds), group=group, signatures=signatures)


def _check_address_space() -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise CAError(
            f"the limit of this process's address space (ulimit -v) is {limit >> 20} MiB, "
            f"and gRPC needs {_ADDRESS_SPACE >> 20} MiB",
            hint="raise the limit, or use one of memory itself: MemoryMax= of a service",
        )


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
        (version,) = self._auth.get("ssl_tls_version", (b"TLS",))  # gRPC before 1.85 does not tell
        dns_names = tuple(names.get_values_for_type(x509.DNSName))
        return Handshake(server_name, dns_names, fingerprint(certificate), version.decode(), seconds)


@contextmanager
def _serving(material: TLSMaterial, peer: _Peer, timeout: timedelta) -> Iterator[str]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="handshake")
    server = grpc.server(pool)
    server.add_generic_rpc_handlers((peer,))
    try:
        try:
            port = server.add_secure_port("127.0.0.1:0", server_credentials(material))
        except RuntimeError:
            known = not _is_too_new_for_ssl(material)
            reason = (known and _load_problem(material)) or "gRPC does not say why"
            raise MaterialError(f"gRPC cannot serve: {reason}") from None
        server.start()
        yield f"127.0.0.1:{port}"
    finally:
        # Its thread ends where it can't start another one (RuntimeError): then it never says that it stopped.
        server.stop(0).wait(timeout.total_seconds())
        pool.shutdown()


def _call(address: str, material: TLSMaterial, timeout: timedelta, anonymous: bool) -> None:
    credentials = channel_credentials(material)
    if anonymous:
        credentials = grpc.ssl_channel_credentials(root_certificates=material.trust_pem)
    # gRPC's core reads http_proxy and would ask a proxy for the way to this host's loopback address
    options = [*channel_options(material), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(address, credentials, options) as channel:
        greet: Callable[..., bytes] = cast(Any, channel.unary_unary(_METHOD))
        greet(_GREETING, timeout=timeout.total_seconds())


def _failure(
    server: TLSMaterial, guest: TLSMaterial, timeout: timedelta, anonymous: bool, call: grpc.Call
) -> MaterialError:
    who = f"the mutual TLS handshake of {server.identity} (server) and {guest.identity} (guest) failed"
    if call.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return MaterialError(f"{who}: no answer within {timeout.total_seconds():g} s")
    if reason := guest_chain_problem(guest):
        return MaterialError(f"{who}: {reason}", hint=GUEST_CHAIN_HINT)
    older = any(map(_is_too_new_for_ssl, (server, guest)))
    reason = (_explained if older else _refusal)(server, guest, anonymous)
    return MaterialError(f"{who}: {reason or f'gRPC says: {call.details()}'}")


def _load_problem(material: TLSMaterial) -> str | None:
    try:
        material.ssl_context()
    except (ssl.SSLError, ValueError) as error:
        return f"certificate, key or trust of {material.identity} cannot be used: {_words(error)}"
    return None


def _refusal(server: TLSMaterial, guest: TLSMaterial, anonymous: bool) -> str | None:
    """Do the handshake again in memory, with a library that says who refused whom, and why."""
    if problem := _load_problem(guest):
        return problem
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


# --- with cryptography's OpenSSL ------------------------------------------------------------------

_ML_DSA_FROM = (3, 5)
"""The first version of OpenSSL that knows ML-DSA."""

_NO_AUTO_CHAIN = 0x8
"""SSL_MODE_NO_AUTO_CHAIN, which pyOpenSSL does not name: no root after a leaf that has no issuers."""

# X509_verify_cert_error_string(3), which pyOpenSSL does not pass on
_REASONS = {
    7: "certificate signature failure",
    9: "certificate is not yet valid",
    10: "certificate has expired",
    18: "self-signed certificate",
    19: "self-signed certificate in certificate chain",
    20: "unable to get local issuer certificate",
    21: "unable to verify the first certificate",
    25: "path length constraint exceeded",
    26: "unsuitable certificate purpose",
    47: "permitted subtree violation",
    48: "excluded subtree violation",
}


def _is_too_new_for_ssl(material: TLSMaterial) -> bool:
    if ssl.OPENSSL_VERSION_INFO >= _ML_DSA_FROM:
        return False
    known = parse_certificates(material.certificate_chain_pem + material.trust_pem, "material")
    return any(signed_with(one).startswith("ML-DSA") for one in known)


class _End:
    """One end of a connection, which remembers why it did not like the other's certificate."""

    def __init__(self, material: TLSMaterial, *, server: bool, anonymous: bool = False) -> None:
        self.problem = ""
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_mode(_NO_AUTO_CHAIN)
        if not anonymous:
            leaf, *issuers = parse_certificates(material.certificate_chain_pem, "certificate chain")
            context.use_certificate(leaf)
            for issuer in issuers:
                context.add_extra_chain_cert(issuer)
            context.use_privatekey(cast(Any, load_pem_private_key(material.private_key_pem, None)))
        store = context.get_cert_store()
        assert store is not None  # noqa: S101 - every context has one
        for anchor in parse_certificates(material.trust_pem, "trust anchors"):
            store.add_cert(crypto.X509.from_cryptography(anchor))
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, self._look)
        context.set_alpn_protos([b"h2"])
        self.context = context

    def _look(self, _: SSL.Connection, __: crypto.X509, code: int, ___: int, passed: int) -> bool:
        if not passed:
            self.problem = self.problem or _REASONS.get(code, f"its certificate is not valid (code {code})")
        return bool(passed)


def _explained(server: TLSMaterial, guest: TLSMaterial, anonymous: bool) -> str | None:
    """Do what `_refusal` does, with an OpenSSL that knows ML-DSA."""
    client, host = _End(guest, server=False, anonymous=anonymous), _End(server, server=True)
    ends = {"guest": SSL.Connection(client.context), "server": SSL.Connection(host.context)}
    ends["guest"].set_connect_state()
    ends["server"].set_accept_state()
    ways = {"guest": (ends["server"], client), "server": (ends["guest"], host)}
    for name in ("guest", "server", "guest", "server"):
        other, end = ways[name]
        try:
            ends[name].do_handshake()
        except SSL.WantReadError:
            pass
        except SSL.Error as error:
            reasons = [entry[-1] for entry in error.args[0]] if error.args else []
            opposite = {"guest": "server", "server": "guest"}[name]
            return f"the {name} refuses the {opposite}: {end.problem or ', '.join(reasons)}"
        with suppress(SSL.WantReadError):
            other.bio_write(ends[name].bio_read(_FLIGHT))
    return None


_FLIGHT = 1024 * 1024
"""More bytes than one side says at once."""


def _group(address: str, guest: TLSMaterial, timeout: timedelta) -> str:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout.total_seconds()) as plain:
        plain.setblocking(True)  # pyOpenSSL knows no timeouts
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout))
        connection = SSL.Connection(_End(guest, server=False).context, plain)
        connection.set_connect_state()
        try:
            connection.do_handshake()
        except SSL.Error:
            return ""
        return connection.get_group_name() or ""


def _timeval(timeout: timedelta) -> bytes:
    return struct.pack("@ll", int(timeout.total_seconds()), timeout.microseconds)
