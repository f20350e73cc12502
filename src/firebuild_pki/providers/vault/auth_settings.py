"""Settings of ``ca.vault.auth``: one model per way to log in, told apart by ``method``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from firebuild_pki.settings import SecretRef, Settings

SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
"""Where Kubernetes mounts the token of a pod's service account."""

_FORBIDDEN = set("?#%\\\"'`$<>{}*+")


def _check_path(value: str) -> str:
    trimmed = value.strip("/")
    bad = not trimmed or any(one.isspace() or not one.isprintable() for one in trimmed)
    if bad or set(trimmed) & _FORBIDDEN or set(trimmed.split("/")) & {"", ".", ".."}:
        text = f'expected a path such as pki or teams/build/pki, found "{value}"'
        raise PydanticCustomError("mount_path", "{text}", {"text": text})
    return trimmed


def _check_name(value: str) -> str:
    if "/" in _check_path(value):
        text = f'expected a name without a slash, found "{value}"'
        raise PydanticCustomError("vault_name", "{text}", {"text": text})
    return value


MountPath = Annotated[str, AfterValidator(_check_path)]
"""Path of a mount or namespace; slashes at the ends do not count."""

Name = Annotated[str, AfterValidator(_check_name)]
"""Name of a role or issuer: one segment of a path."""


class TokenAuth(Settings):
    """A token that the operator made; it is used as it is, and never revoked."""

    method: Literal["token"]
    """Use a token that was made beforehand."""
    token: SecretRef
    """Where the token is."""


class TokenFileAuth(Settings):
    """A file that another program, such as the agent of Vault, keeps filled with a valid token."""

    method: Literal["token_file"]
    """Use the token that is in a file, and read the file again when the token is refused."""
    path: str
    """Path of the file."""


class AppRoleAuth(Settings):
    """AppRole: a role id and a secret id."""

    method: Literal["approle"]
    """Log in with AppRole."""
    mount: MountPath = "approle"
    """Where the AppRole auth method is mounted, below auth/."""
    role_id: SecretRef
    """Where the role id is."""
    secret_id: SecretRef | None = None
    """Where the secret id is. Leave it out only for roles with bind_secret_id=false."""


class KubernetesAuth(Settings):
    """The service account of a pod."""

    method: Literal["kubernetes"]
    """Log in with the service account of the pod."""
    mount: MountPath = "kubernetes"
    """Where the Kubernetes auth method is mounted, below auth/."""
    role: Name
    """Role of the auth method."""
    jwt: SecretRef = SecretRef(file=SERVICE_ACCOUNT_TOKEN)
    """Where the token of the service account is."""


class JWTAuth(Settings):
    """A JSON web token, such as the OIDC token that a CI system gives to a job."""

    method: Literal["jwt"]
    """Log in with a JSON web token."""
    mount: MountPath = "jwt"
    """Where the JWT auth method is mounted, below auth/."""
    role: Name | None = None
    """Role of the auth method; by default the one that the mount names as its default."""
    jwt: SecretRef
    """Where the JSON web token is."""


class CertAuth(Settings):
    """The TLS client certificate in ``tls.cert_file`` and ``tls.key_file``."""

    method: Literal["cert"]
    """Log in with the TLS client certificate."""
    mount: MountPath = "cert"
    """Where the TLS certificate auth method is mounted, below auth/."""
    name: Name | None = None
    """Name of the certificate's entry; by default each one that fits is tried."""


AuthSettings = Annotated[
    TokenAuth | TokenFileAuth | AppRoleAuth | KubernetesAuth | JWTAuth | CertAuth,
    Field(discriminator="method"),
]
