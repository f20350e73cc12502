"""The TLS of the proxy: the certificates of peers, contexts from material in memory, failed handshakes."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from firebuild_bootstrap import wire
from firebuild_bootstrap.errors import FirebuildError
from firebuild_pki import TLSMaterial, parse_certificates, read_certificate
from firebuild_pki.display import one_line
from firebuild_pki.values import dataclass

WRONG_GUEST: Final = "its certificate is not the one that was issued for this build"
_MAX_SUBJECT: Final = 256


@dataclass(frozen=True)
class PeerCertificate:
    """What a log says about a certificate: its subject, and the SHA-256 of it in lower-case hexadecimal."""

    subject: str
    fingerprint: str

    @classmethod
    def of(cls, der: bytes) -> PeerCertificate:
        """Describe an untrusted certificate; never raises."""
        return cls(_subject(der), hashlib.sha256(der).hexdigest())


NO_CERTIFICATE: Final = PeerCertificate("", "")


class Pin:
    """Recognises exactly one certificate.

    Args:
        fingerprint: its SHA-256 in hexadecimal, in any case, with or without colons.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint.replace(":", "").lower()

    def matches(self, certificate: PeerCertificate) -> bool:
        """Tell whether a certificate is the pinned one."""
        return hmac.compare_digest(self._fingerprint, certificate.fingerprint)


def _subject(der: bytes) -> str:
    try:
        certificate = read_certificate(der)
        text = certificate.subject.rfc4514_string() or _alternative_names(certificate)
    except Exception:  # untrusted input, and each parser fails with exceptions of its own
        return "(no readable name)"
    return one_line(text, _MAX_SUBJECT)


def _alternative_names(certificate: x509.Certificate) -> str:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return ",".join(f"DNS={name}" for name in extension.value.get_values_for_type(x509.DNSName))


def agreed_group(data: bytes) -> str:
    """Name the group of the key exchange in a server's first bytes (RFC 8446, section 4.1.3), or nothing.

    Args:
        data: what the server sent first, in plain text: a record with a ServerHello of TLS 1.3.
    """
    # Headers of record (5) and handshake (4), version (2), random (32); the session's id with its length;
    # cipher suite (2), compression (1), length of the extensions (2).
    session = 43
    if len(data) <= session or data[0] != _HANDSHAKE_RECORD or data[5] != _SERVER_HELLO:
        return ""
    at = session + 1 + data[session] + 5
    while at + 6 <= len(data):
        kind, size, group = struct.unpack_from(">HHH", data, at)
        if kind == _KEY_SHARE:
            return _GROUPS.get(group, f"0x{group:04x}")
        at += 4 + size
    return ""


_SERVER_HELLO: Final = 2
_KEY_SHARE: Final = 51
# The registry "TLS Supported Groups", with OpenSSL's names.
_GROUPS: Final = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x001D: "x25519",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
}


# --- contexts and handshakes ----------------------------------------------------------------------

ALPN: Final = b"h2"
CONTACT: Final = wire.CONTACT_PROTOCOL.encode()
# Forward secrecy and authenticated encryption only, as HTTP/2 asks for (RFC 9113, section 9.2.2).
_TLS12_CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20"
_NO_AUTO_CHAIN: Final = 0x8  # SSL_MODE_NO_AUTO_CHAIN, which pyOpenSSL does not name
_ENABLE_PARTIAL_WRITE: Final = 0x1  # SSL_MODE_ENABLE_PARTIAL_WRITE, which pyOpenSSL sets and does not name
# X509_V_ERR_*, openssl-verification-options(1).
_VERIFY_PROBLEMS: Final = {
    7: "the signature of its certificate is wrong",
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: "its certificate is self-signed",
    19: "its certificate was issued by a CA that is not trusted",
    20: "its certificate was issued by a CA that is not trusted",
    21: "its certificate was issued by a CA that is not trusted",
    24: "its certificate was issued by a certificate that is not a CA",
    25: "the path length of its chain exceeds what a CA allows",
    26: "its certificate is not meant for TLS clients",
    79: "its certificate was issued by a certificate that is not a CA",
}
_TLS_PROBLEMS: Final = {
    "peer did not return a certificate": "it presented no certificate",
    "unsupported protocol": "it offers no TLS version from 1.2 on",
    "no shared cipher": "it offers no cipher that is allowed here",
    "no suitable signature algorithm": "it supports no signature algorithm of the server's key",
    "certificate verify failed": "its certificate could not be verified",
}


@dataclass(frozen=False)
class Inspection:
    """What the verification of one peer finds.

    Args:
        pin: the certificate that it has to have.
    """

    pin: Pin
    certificate: PeerCertificate = NO_CERTIFICATE
    failure: str = ""
    accepted: bool = False

    @property
    def problem(self) -> str:
        """Why the peer must not pass; empty only when its own certificate was seen and is the one."""
        return "" if self.accepted else self.failure or "its certificate was not verified"

    def verified(self, certificate: bytes, code: int, depth: int, passed: bool) -> bool:
        """Take one call of OpenSSL's verification; the return value tells OpenSSL to go on.

        A problem of an issuer lets it go on until the peer's own certificate was seen, which is always
        the last one and is refused then.
        """
        if not passed and not self.failure:
            self.failure = _VERIFY_PROBLEMS.get(code, f"its certificate is not valid (OpenSSL code {code})")
        if depth > 0:
            return True
        self.certificate = PeerCertificate.of(certificate)
        if not self.failure and not self.pin.matches(self.certificate):
            self.failure = WRONG_GUEST
        self.accepted = not self.failure
        return self.accepted


def server_context(material: TLSMaterial) -> SSL.Context:
    """Make the context of the public port: TLS 1.2 or later, a client certificate required.

    What is spoken is HTTP/2, or the contact of a guest that wants to be passed through.
    """
    context = _context(SSL.TLS_SERVER_METHOD, material)
    context.set_alpn_select_callback(
        lambda _, offered: next(
            (known for known in (CONTACT, ALPN) if known in offered), SSL.NO_OVERLAPPING_PROTOCOLS
        )
    )
    # Every connection shows its certificate: no session is ever resumed.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    return context


def client_context(material: TLSMaterial) -> SSL.Context:
    """Make the context of the second leg, to the gRPC server."""
    context = _context(SSL.TLS_CLIENT_METHOD, material)
    context.set_alpn_protos([ALPN])
    return context


def _context(method: int, material: TLSMaterial) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    # One call of SSL_write encrypts all that it gets, not one record of 16 KiB: measurably faster.
    context.clear_mode(_ENABLE_PARTIAL_WRITE)
    # A leaf without issuers would get the root behind it: with ML-DSA more than gRPC's server takes.
    context.set_mode(_NO_AUTO_CHAIN)
    context.set_cipher_list(_TLS12_CIPHERS)
    leaf, *issuers = parse_certificates(material.certificate_chain_pem, "certificate chain")
    context.use_certificate(leaf)
    for issuer in issuers:
        context.add_extra_chain_cert(issuer)
    key = load_pem_private_key(material.private_key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise FirebuildError(
            f"the TLS material of {material.identity} has a key that gRPC cannot use",
            hint="use an EC (P-256, P-384) or RSA key",
        )
    context.use_privatekey(key)
    context.check_privatekey()
    store = context.get_cert_store()
    assert store is not None  # noqa: S101 - every context has one
    for anchor in parse_certificates(material.trust_pem, "trust anchors"):
        store.add_cert(crypto.X509.from_cryptography(anchor))
    # The trust may end at an intermediate whose root is offline; gRPC's own TLS accepts that, too.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _on_verify)
    return context


def _on_verify(
    connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, passed: int
) -> bool:
    inspection = connection.get_app_data()
    assert isinstance(inspection, Inspection)  # noqa: S101 - `TlsStream` sets it before any handshake
    der = crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate)
    return inspection.verified(der, code, depth, bool(passed))


def handshake_problem(error: SSL.Error, inspection: Inspection, first_bytes: bytes) -> str:
    """Say why a handshake failed.

    Args:
        error: what OpenSSL raised.
        inspection: of the same connection.
        first_bytes: the first bytes that the peer sent.
    """
    if first_bytes and first_bytes[0] != _HANDSHAKE_RECORD:
        http2 = first_bytes.startswith(b"PRI * HTTP/2.0")
        return f"it does not speak TLS but {'plaintext HTTP/2' if http2 else 'something else'}"
    if inspection.failure:
        return inspection.failure
    return _openssl_problem(error)


_HANDSHAKE_RECORD: Final = 0x16


def _openssl_problem(error: SSL.Error) -> str:
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    reasons = [entry[-1] for entry in entries if entry[-1]]
    reason = reasons[-1] if reasons else "unknown"
    if "alert" in reason:
        return f"it refused this server ({reason})"
    return _TLS_PROBLEMS.get(reason, f"the TLS handshake failed ({reason})")
