"""`TLSMaterial` as gRPC credentials. The only module of the framework that imports grpc."""

from __future__ import annotations

from binascii import a2b_base64
from typing import Final

import grpc

from firebuild_pki.display import counted
from firebuild_pki.material import TLSMaterial

MAX_GUEST_CHAIN: Final = 8400
"""How many bytes (DER) of certificates a client may show. A gRPC server writes them into two session tickets,
for which its core has a buffer of 17 KiB, and breaks the connection off if they do not fit (gRPC 1.85)."""


GUEST_CHAIN_HINT: Final = (
    "let the CA that signs be the trust anchor itself (with the provider file: name it in anchors); "
    "of CAs with ML-DSA-44 one intermediate fits, of those with ML-DSA-65 and ML-DSA-87 none"
)
"""What to do about a `guest_chain_problem`."""


def server_credentials(material: TLSMaterial) -> grpc.ServerCredentials:
    """Make credentials for ``server.add_secure_port`` that demand a client certificate."""
    return grpc.ssl_server_credentials(
        [(material.private_key_pem, material.certificate_chain_pem)],
        root_certificates=material.trust_pem,
        require_client_auth=True,
    )


def channel_credentials(material: TLSMaterial) -> grpc.ChannelCredentials:
    """Make credentials for ``grpc.secure_channel``; pass `channel_options` along with them."""
    return grpc.ssl_channel_credentials(
        root_certificates=material.trust_pem,
        private_key=material.private_key_pem,
        certificate_chain=material.certificate_chain_pem,
    )


def channel_options(material: TLSMaterial) -> list[tuple[str, str]]:
    """Make the client check the server's name, whatever address it dials."""
    return [("grpc.ssl_target_name_override", material.server_name)]


def guest_chain_problem(guest: TLSMaterial) -> str | None:
    """Tell why a gRPC server cannot take a client's certificates; None if it can."""
    blocks = guest.certificate_chain_pem.replace(b"\r", b"").split(b"-----BEGIN CERTIFICATE-----")[1:]
    size = sum(len(a2b_base64(block.partition(b"-----END")[0])) for block in blocks)
    if size <= MAX_GUEST_CHAIN:
        return None
    return (
        f"the {counted(len(blocks), 'certificate')} of {guest.identity} have {counted(size, 'byte')}, "
        f"and a gRPC server takes {MAX_GUEST_CHAIN} of a client"
    )
