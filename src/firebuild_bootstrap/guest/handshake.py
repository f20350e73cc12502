"""One mutual-TLS handshake of our own with the bootstrap server, before gRPC makes its connection.

gRPC's core would accept a certificate without subject alternative names by its common name, which nobody may
rely on (RFC 9525, section 2), and of a server that refuses the guest's certificate after the handshake, as
TLS 1.3 does, it knows nothing but that the connection ended. So the server is looked at first, and gRPC then
trusts the one certificate that was seen, and no other.
"""

from __future__ import annotations

import base64
import os
import re
import socket
import ssl
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from firebuild_bootstrap import wire
from firebuild_bootstrap.polling import readable

from .errors import InputError
from .stop import Stop

# What begins every HTTP/2 connection (RFC 9113, section 3.4): a server that took the guest answers it.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_ALERT = "_ALERT_"
_SPEAK_SECONDS = 0.2
_DROPPED = "the server closed the connection after the TLS handshake: it refuses the guest, likely"
# Short, because nothing ends it: an address that swallows everything is tried again.
_CONNECT_SECONDS = 2.0


_CERTIFICATE = re.compile("-----BEGIN CERTIFICATE-----([^-]*)-----END CERTIFICATE-----")
_ML_DSA_FROM = (3, 5)
# id-ml-dsa-44, -65 and -87 in DER (RFC 9881, section 2).
_ML_DSA = re.compile(rb"\x06\x09\x60\x86\x48\x01\x65\x03\x04\x03[\x11-\x13]")

_TOKEN = re.compile(rb"[0-9a-f]{%d}" % (2 * wire.TOKEN_BYTES))


class Contact(NamedTuple):
    """What a first contact brings.

    Args:
        certificate: that the server showed, in PEM.
        token: with which further connections are passed through to gRPC; empty where the server has none.
    """

    certificate: bytes
    token: str


class NotNow(Exception):
    """The server can't be reached at the moment; the message says what happened."""


class Dropped(NotNow):
    """The server took part in the handshake and then closed the connection without a word."""


class Refusal(Exception):
    """One end refuses the other; trying again can't help."""


def is_beyond_openssl(block: wire.BootstrapBlock) -> bool:
    """Say whether the metadata's certificates are signed with ML-DSA, and Python's OpenSSL is too old for it.

    gRPC's core has a TLS of its own, which knows ML-DSA.
    """
    if ssl.OPENSSL_VERSION_INFO >= _ML_DSA_FROM:
        return False
    for one in _CERTIFICATE.findall(block.ca_chain + block.cert):
        with suppress(ValueError):
            if _ML_DSA.search(base64.b64decode(one)):
                return True
    return False


def client_context(block: wire.BootstrapBlock) -> ssl.SSLContext:
    """Return what the guest shows and what it accepts.

    Raises:
        InputError: the metadata's certificate, key or CA chain can't be used, or don't belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    # As gRPC's core: the chain of the metadata may end in an intermediate.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # Servers that do not know the first choose the second.
    context.set_alpn_protocols([wire.CONTACT_PROTOCOL, "h2"])
    member = "CAChain"
    try:
        context.load_verify_locations(cadata=block.ca_chain)
        member = "Cert and Key"
        _load(context, f"{block.cert}\n{block.key}\n")
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
            raise InputError(
                "Key of the Bootstrap metadata does not belong to the certificate in Cert"
            ) from None
        # A text that is no PEM at all has no reason in some versions of OpenSSL.
        why = (getattr(error, "reason", None) or "").replace("_", " ").lower() or "it is not PEM"
        raise InputError(f"{member} of the Bootstrap metadata can't be used: {why}") from None
    return context


def has_nameless_issuer(context: ssl.SSLContext) -> bool:
    """Say whether a CA of the chain has no name, as those of old servers.

    What such a one issues to nobody by name is self-signed to OpenSSL, and refused (X509_self_signed(3)).
    """
    return not all(certificate.get("subject") for certificate in context.get_ca_certs())


def _load(context: ssl.SSLContext, pem: str) -> None:
    """Load certificate and key, which the module takes from files only, from one in memory."""
    descriptor = os.memfd_create("credentials", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(pem.encode())
        # Without a password the module would ask the terminal for that of an encrypted key.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password="")
    finally:
        os.close(descriptor)


def first_contact(block: wire.BootstrapBlock, context: ssl.SSLContext, stop: Stop, timeout: float) -> Contact:
    """Shake hands with the server and return the certificate that it showed.

    It holds the wanted name among its subject alternative names, the CA chain leads to it, it is valid, and
    the server has accepted the guest's own.

    Args:
        block: where the server is, and its name.
        context: of `client_context`.
        stop: ends the attempt.
        timeout: seconds that each of its steps may take.

    Raises:
        NotNow: nobody answers, or not properly.
        Refusal: one end does not accept the other.
        InputError: the server's address or name can be nobody's.
    """
    try:
        # Of a name that it refuses, wrap_socket would leave a socket open.
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=block.server_name)
        with socket.create_connection(_address(block.host_port), min(timeout, _CONNECT_SECONDS)) as plain:
            plain.settimeout(timeout)
            tls = context.wrap_socket(plain, server_hostname=block.server_name, do_handshake_on_connect=False)
            with tls, stop.calling(partial(_hang_up, tls)):
                return _shake_hands(tls)
    except ssl.SSLCertVerificationError as error:
        raise Refusal(f"the server's certificate is not accepted: {error.verify_message}") from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError) as error:
        raise NotNow("the connection was closed during the TLS handshake") from error
    except ssl.SSLError as error:
        raise Refusal(_refused(error)) from error
    except OSError as error:
        raise NotNow(error.strerror or str(error)) from error
    except (ValueError, TypeError) as error:  # Python's own: a label without or with more than 63 bytes, NUL
        raise InputError(
            "HostPort or ServerName of the metadata is not a host name: "
            f"{block.host_port!r:.300}, {block.server_name!r:.300}"
        ) from error


def _shake_hands(tls: ssl.SSLSocket) -> Contact:
    tls.do_handshake()
    certificate = ssl.DER_cert_to_PEM_cert(tls.getpeercert(binary_form=True) or b"").encode()
    if tls.selected_alpn_protocol() == wire.CONTACT_PROTOCOL:
        return Contact(certificate, _told_token(tls))
    # A client of TLS 1.3 has finished before the server looks at its certificate (RFC 8446, section 2).
    try:
        # Most servers speak first. Bytes that one has not read when it refuses would reset the connection,
        # and its alert would be lost with it.
        if not tls.pending() and not readable(tls, seconds=_SPEAK_SECONDS):
            tls.sendall(_PREFACE)
        answered = tls.recv(1)
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        answered = b""
    if not answered:
        raise Dropped(_DROPPED)
    return Contact(certificate, "")


def _told_token(tls: ssl.SSLSocket) -> str:
    token = b""
    try:
        while len(token) < 2 * wire.TOKEN_BYTES and (more := tls.recv(2 * wire.TOKEN_BYTES)):
            token += more
    except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        token = b""
    if not token:
        raise Dropped(_DROPPED)
    if not _TOKEN.fullmatch(token):
        raise NotNow("the server sent something else than a token")
    return token.decode("ascii")


def _refused(error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if _ALERT in reason:  # such as TLSV1_ALERT_UNKNOWN_CA
        alert = reason.partition(_ALERT)[2].replace("_", " ").lower()
        return f"the server refused the guest's certificate or its TLS, with the alert: {alert}"
    return f"the TLS handshake failed: {reason.replace('_', ' ').lower()}"


def _address(host_port: str) -> tuple[str, int]:
    host, _, port = host_port.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"HostPort of the metadata: expected host:port, found {host_port!r:.200}")
    return host.strip("[]"), int(port)


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        # Not SSLSocket's own, which would make the rest of the handshake one without TLS.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
