"""Real OpenBao servers for tests: one command away, on loopback, gone at the end.

    with DevServer(directory) as bao:                     # ready at once, everything in memory
        pki = mount_pki(bao.api)                          # a root, and an intermediate below it
        add_role(bao.api, "server", use="server")
        token = create_token(bao.api, write_policy(bao.api, "builds", sign_policy("server")))

`StoredServer` keeps its data on disk and can be sealed, unsealed, stopped and started again on the
same port; `RaftCluster` is three of them. Fixtures for a conftest.py are in `baoserver.fixtures`.
"""

from baoserver.api import Api, ApiError
from baoserver.auth import (
    AppRole,
    JwtIssuer,
    create_token,
    enable_approle,
    enable_cert_auth,
    enable_jwt,
    write_policy,
)
from baoserver.cluster import RaftCluster
from baoserver.pki import PKI, add_role, mount_pki, sign_policy
from baoserver.server import DevServer, Server, ServerFailed, StoredServer

__all__ = [
    "PKI",
    "Api",
    "ApiError",
    "AppRole",
    "DevServer",
    "JwtIssuer",
    "RaftCluster",
    "Server",
    "ServerFailed",
    "StoredServer",
    "add_role",
    "create_token",
    "enable_approle",
    "enable_cert_auth",
    "enable_jwt",
    "mount_pki",
    "sign_policy",
    "write_policy",
]
