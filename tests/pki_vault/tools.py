"""What the tests of the provider `vault` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest

from baoserver import PKI, Api, add_role, create_token, enable_approle, mount_pki, sign_policy, write_policy
from firebuild_pki import Authority, CASettings, open_authority, validate
from firebuild_pki.documents import Document
from firebuild_pki.keys import generate_key, private_key_pem
from pki.tools import CLIENT_AUTH, OperatorCA, pem

ENVIRON = "VAULT_TEST_TOKEN"
"""Where the settings of `Backend.block` look for the token."""


@dataclass(frozen=True)
class Backend:
    """A prepared server, as the settings see it.

    Args:
        api: with a token that may do anything.
        pki: the mount.
        token: may sign with the two roles.
    """

    api: Api
    pki: PKI
    token: str
    policy: str

    @classmethod
    def prepared(cls, api: Api, mount: str, *, intermediate: bool = True) -> Self:
        pki = mount_pki(api, mount, intermediate=intermediate)
        add_role(api, "server", mount=mount, use="server")
        add_role(api, "guest", mount=mount, use="client")
        name = "sign-" + mount.replace("/", "-")
        write_policy(api, name, sign_policy("server", "guest", mount=mount, revoke=True))
        return cls(api, pki, create_token(api, name), name)

    @property
    def environ(self) -> dict[str, str]:
        return {ENVIRON: self.token}

    def with_token(self, token: str) -> Self:
        return replace(self, token=token)

    def block(self, **changes: Any) -> dict[str, Any]:
        """The block ``ca.vault``; a change to None leaves a setting out."""
        block = {
            "address": self.api.address,
            "namespace": self.api.namespace or None,
            "mount": self.pki.mount,
            "server_role": "server",
            "guest_role": "guest",
            "tls": {"ca_file": str(self.api.ca_file)} if self.api.ca_file else None,
            "auth": {"method": "token", "token": {"env": ENVIRON}},
            **changes,
        }
        return {name: value for name, value in block.items() if value is not None}

    def settings(self, *, ca: Mapping[str, Any] | None = None, **changes: Any) -> CASettings:
        return ca_settings(self.block(**changes), **(ca or {}))

    def open(
        self, *, environ: Mapping[str, str] | None = None, ca: Mapping[str, Any] | None = None, **changes: Any
    ) -> Authority:
        """Open an authority; use it in a ``with`` block."""
        settings = self.settings(ca=ca, **changes)
        return open_authority(settings, build_id="b1", environ=self.environ if environ is None else environ)


def ca_settings(block: Mapping[str, Any], **others: Any) -> CASettings:
    document = Document({"ca": {"provider": "vault", "vault": dict(block), **others}})
    return validate(CASettings, document, at="ca")


@contextmanager
def raises(error: type[Exception], *parts: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Expect an error whose text has all the parts."""
    with pytest.raises(error) as caught:
        yield caught
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text


@dataclass(frozen=True)
class ClientCertificate:
    """A TLS client certificate in files, for logging in.

    Args:
        ca_pem: the CA that made it.
        cert_file: the certificate.
        key_file: its key.
    """

    ca_pem: str
    cert_file: Path
    key_file: Path

    @classmethod
    def written(cls, directory: Path, *, name: str = "builder.example") -> Self:
        now = datetime.now(UTC)
        valid = (now - timedelta(hours=1), now + timedelta(hours=1))
        ca, key = OperatorCA("Clients", valid=valid), generate_key()
        leaf = ca.leaf(key.public_key(), [name], usages=[CLIENT_AUTH], valid=valid)
        made = cls(ca.pem.decode(), directory / "client.pem", directory / "client.key")
        made.cert_file.write_bytes(pem(leaf))
        made.key_file.write_bytes(private_key_pem(key))
        made.key_file.chmod(0o600)
        return made

    def block(self, backend: Backend) -> dict[str, str]:
        """The block ``tls``."""
        return {
            "ca_file": str(backend.api.ca_file),
            "cert_file": str(self.cert_file),
            "key_file": str(self.key_file),
        }


APPROLE = {"method": "approle", "role_id": {"env": "ROLE_ID"}, "secret_id": {"env": "SECRET_ID"}}


def approle(backend: Backend, mount: str, **parameters: Any) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Set up AppRole at a mount; return the block ``auth`` and the environment."""
    made = enable_approle(backend.api, backend.policy, mount=mount, **parameters)
    return {**APPROLE, "mount": mount}, {"ROLE_ID": made.role_id, "SECRET_ID": made.secret_id}
