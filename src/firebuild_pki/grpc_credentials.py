"""`TLSMaterial` as gRPC credentials. The only module of the framework that imports grpc."""

from __future__ import annotations

import grpc

from firebuild_pki.material import TLSMaterial


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
