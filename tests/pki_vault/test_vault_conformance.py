"""The conformance kit against real servers: each way to reach and to log in to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from baoserver import (
    JwtIssuer,
    add_role,
    create_token,
    enable_approle,
    enable_cert_auth,
    enable_jwt,
    write_policy,
)
from firebuild_pki.conformance import ProviderConformance
from pki_vault.tools import ENVIRON, Backend, ClientCertificate

pytestmark = [pytest.mark.needs("bao"), pytest.mark.xdist_group("vault-conformance")]


class VaultConformance(ProviderConformance):
    """What the variants share."""

    @pytest.fixture
    def at(self, backend: Backend) -> Backend:
        """The server."""
        return backend

    @pytest.fixture
    def auth(self, at: Backend) -> Mapping[str, Any]:
        """The block ``auth``."""
        return {"method": "token", "token": {"env": ENVIRON}}

    @pytest.fixture
    def ca_environ(self, at: Backend) -> Mapping[str, str]:
        return at.environ

    @pytest.fixture
    def ca_settings(self, at: Backend, auth: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"provider": "vault", "vault": at.block(auth=auth)}

    @pytest.fixture
    def ca_bad_settings(self) -> Mapping[str, object]:
        return {
            "address": "http://vault.example:8200",
            "mount": "../sys",
            "server_role": "a/b",
            "auth.method": "guess",
            "timeout": "0s",
            "retry_for": 3,
        }

    @pytest.fixture
    def ca_refusing_settings(self, at: Backend, auth: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"provider": "vault", "name_suffix": "elsewhere.example", "vault": at.block(auth=auth)}

    @pytest.fixture
    def ca_broken_settings(self, at: Backend, auth: Mapping[str, Any]) -> Mapping[str, Any]:
        closed = "https://127.0.0.1:1"
        return {"provider": "vault", "vault": at.block(auth=auth, address=closed, retry_for="100ms")}


class TestToken(VaultConformance):
    """A token, plain http on loopback, an intermediate below a root."""


class TestRootOnly(VaultConformance):
    """A mount whose root signs the leaves."""

    @pytest.fixture
    def at(self, backend: Backend, unique: str) -> Backend:
        return Backend.prepared(backend.api, f"teams/{unique}", intermediate=False)

    @pytest.fixture
    def ca_roll_over(self, at: Backend) -> Callable[[], None]:
        def roll_over() -> None:
            root = {"common_name": "Next", "key_type": "ec", "key_bits": 256, "ttl": "700h"}
            at.api.write(f"{at.pki.mount}/root/rotate/internal", **root)
            at.api.write(f"{at.pki.mount}/root/replace", default="next")

        return roll_over


class TestRolesThatStoreNothing(VaultConformance):
    """Roles with no_store=true, and an issuer named in the settings."""

    @pytest.fixture
    def ca_settings(self, at: Backend, unique: str) -> Mapping[str, Any]:
        for profile, use in (("server", "server"), ("guest", "client")):
            add_role(at.api, f"{unique}-{profile}", use=use, no_store=True)  # type: ignore[arg-type]
        roles = {"server_role": f"{unique}-server", "guest_role": f"{unique}-guest"}
        return {"provider": "vault", "vault": at.block(issuer="default", **roles)}

    @pytest.fixture
    def ca_environ(self, at: Backend) -> Mapping[str, str]:
        return {ENVIRON: at.api.token}


class AnotherWayIn(VaultConformance):
    """What only differs in how the server is reached: which keys it certifies is not tried again."""

    test_the_kind_of_key_is_certified = None  # type: ignore[assignment]


class TestTokenFile(AnotherWayIn):
    """The file of an agent."""

    @pytest.fixture
    def auth(self, at: Backend, tmp_path: Path) -> Mapping[str, Any]:
        file = tmp_path / "token"
        file.write_text(at.token)
        return {"method": "token_file", "path": str(file)}


class TestAppRole(AnotherWayIn):
    """AppRole, over TLS."""

    @pytest.fixture
    def at(self, tls_backend: Backend) -> Backend:
        return tls_backend

    @pytest.fixture
    def auth(self, at: Backend, tmp_path: Path) -> Mapping[str, Any]:
        made = enable_approle(at.api, at.policy)
        for name in ("role_id", "secret_id"):
            (tmp_path / name).write_text(f"{getattr(made, name)}\n")
        return {
            "method": "approle",
            "role_id": {"file": str(tmp_path / "role_id")},
            "secret_id": {"file": str(tmp_path / "secret_id")},
        }


@pytest.fixture(scope="module")
def issuer() -> JwtIssuer:
    return JwtIssuer()


class TestJWT(AnotherWayIn):
    """The token of a CI job."""

    @pytest.fixture
    def auth(self, at: Backend) -> Mapping[str, Any]:
        return {"method": "jwt", "mount": "ci/jobs", "role": "builds", "jwt": {"env": "JOB_TOKEN"}}

    @pytest.fixture
    def ca_environ(self, at: Backend, issuer: JwtIssuer) -> Mapping[str, str]:
        enable_jwt(at.api, issuer, at.policy, mount="ci/jobs")
        return {"JOB_TOKEN": issuer.token(aud="https://vault.example", sub="project/main")}


class TestCertificate(AnotherWayIn):
    """A TLS client certificate."""

    @pytest.fixture
    def at(self, tls_backend: Backend) -> Backend:
        return tls_backend

    @pytest.fixture
    def ca_settings(self, at: Backend, tmp_path: Path) -> Mapping[str, Any]:
        own = ClientCertificate.written(tmp_path)
        enable_cert_auth(at.api, own.ca_pem, at.policy)
        return {"provider": "vault", "vault": at.block(auth={"method": "cert"}, tls=own.block(at))}


class TestNamespace(AnotherWayIn):
    """A namespace below another."""

    @pytest.fixture
    def at(self, namespaced_backend: Backend) -> Backend:
        return namespaced_backend


class TestSmallestPolicy(VaultConformance):
    """A token that may sign, look at the roles and revoke; not even look at itself."""

    @pytest.fixture
    def ca_environ(self, at: Backend) -> Mapping[str, str]:
        rules = "".join(
            f'path "pki/{path}" {{ capabilities = ["update"] }}\n'
            for path in ("sign/server", "sign/guest", "revoke")
        )
        policy = write_policy(at.api, "smallest", rules)
        return {ENVIRON: create_token(at.api, policy, no_default_policy=True)}
