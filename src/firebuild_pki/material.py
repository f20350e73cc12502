"""`TLSMaterial`: all that one end of a mutual TLS connection needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


@dataclass(frozen=True, slots=True)
class TLSMaterial:
    """Certificate, key and trust of one end of a connection. The key never shows in a repr.

    Args:
        certificate_chain_pem: leaf first, then its issuers, no root.
        private_key_pem: PKCS#8 PEM, unencrypted.
        trust_pem: the anchors to check the peer against.
        server_name: the server's DNS name, for both ends: the client must check it.
        identity: this end's own DNS name.
        not_before: start of the leaf's validity, UTC.
        not_after: end of the leaf's validity, UTC.
        fingerprint_sha256: of the leaf, in hexadecimal.
    """

    certificate_chain_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)
    trust_pem: bytes = field(repr=False)
    server_name: str
    identity: str
    not_before: datetime
    not_after: datetime
    fingerprint_sha256: str

    def ssl_context(self, server_side: bool = False) -> ssl.SSLContext:
        """Make a context for the standard library's ssl: TLS 1.2 or later, peer required.

        A client has to pass ``server_hostname=material.server_name`` to ``wrap_socket``.

        Args:
            server_side: whether the context is for the server.
        """
        import ssl  # gRPC does without

        protocol = ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        # an anchor may be an intermediate whose root is kept elsewhere
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=self.trust_pem.decode())
        self._load_pair(context)
        return context

    def _load_pair(self, context: ssl.SSLContext) -> None:
        # ssl reads keys from paths only; a memfd has one and never touches a disk
        descriptor = os.memfd_create("tls-material")
        try:
            with os.fdopen(os.dup(descriptor), "wb") as memory:
                memory.write(self.private_key_pem + self.certificate_chain_pem)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
