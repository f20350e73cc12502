"""Settings of ``ca.vault``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from firebuild_pki.addresses import is_safe
from firebuild_pki.provider import Note, NoteLevel, Profile
from firebuild_pki.settings import Duration, PositiveDuration, SecretRef, Settings, write_duration

SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
"""Where Kubernetes mounts the token of a pod's service account."""

_FORBIDDEN = set("?#%\\\"'`$<>{}*+")


_LONG = timedelta(seconds=50)


def check_address(text: str) -> str:
    """Check the address of a node, as a validator of settings.

    Returns:
        The address without a slash at its end.

    Raises:
        PydanticCustomError: it is not a base URL, or plain http to another machine.
    """
    wanted = "expected an address such as https://vault.example:8200"
    parts = _split(text)
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
        raise _refusal(f'{wanted}, found "{_without_user(text)}"')
    if parts.username is not None or parts.password is not None:
        raise _refusal(f"{wanted}, found one with a user name or password (not shown)")
    if parts.query or parts.fragment:
        raise _refusal(f'{wanted}, found "?" or "#" in it')
    tail = parts.path.rstrip("/").rpartition("/")[2]
    if tail in {"v1", "ui"}:
        bare = text.rstrip("/").removesuffix(f"/{tail}")
        raise _refusal(f'{wanted}, found "{text}"', f"leave /{tail} out: {bare}")
    if not is_safe(text):
        raise _refusal(
            f'expected https, found plain http to "{parts.hostname}"',
            "plain http is for loopback addresses only: 127.0.0.0/8, ::1 and localhost",
        )
    return text.rstrip("/")


def base_of(url: str) -> tuple[str, str]:
    """Split a full URL into scheme and host, and the path with its query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts._replace(scheme="", netloc="", fragment="").geturl()


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return None if any(one.isspace() for one in url) else parts


def _without_user(text: str) -> str:
    return text.rpartition("@")[2]


def _refusal(text: str, hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("address", "{text}", {"text": text, "hint": hint})


def _check_path(value: str) -> str:
    trimmed = value.strip("/")
    bad = not trimmed or any(one.isspace() or not one.isprintable() for one in trimmed)
    if bad or set(trimmed) & _FORBIDDEN or set(trimmed.split("/")) & {"", ".", ".."}:
        text = f'expected a path such as pki or teams/build/pki, found "{value}"'
        raise PydanticCustomError("mount_path", "{text}", {"text": text})
    return trimmed


def _check_name(value: str) -> str:
    trimmed = _check_path(value)
    if "/" in trimmed:
        text = f'expected a name without a slash, found "{value}"'
        raise PydanticCustomError("vault_name", "{text}", {"text": text})
    return trimmed


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


def _as_tuple(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Addresses = Annotated[
    tuple[Annotated[str, AfterValidator(check_address)], ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class TLSSettings(Settings):
    """The connection to Vault itself; certificates are always verified."""

    ca_file: str | None = None
    """PEM file of the CA certificates that vouch for Vault; by default those of the operating system."""
    cert_file: str | None = None
    """PEM file of a client certificate with its chain, where Vault asks for one."""
    key_file: str | None = None
    """PEM file of the client certificate's private key; other users must not be able to read it."""
    key_passphrase: SecretRef | None = None
    """Where the passphrase of an encrypted key_file is."""
    server_name: str | None = None
    """Name that Vault's certificate must carry, where it is not the host of the address."""


class VaultSettings(Settings):
    """Settings of the provider ``vault``."""

    address: Addresses
    """URL of Vault, or a list of URLs of nodes of one cluster. Plain http on loopback addresses only."""
    tls: TLSSettings = TLSSettings()
    """TLS of the connection to Vault."""
    namespace: MountPath | None = None
    """Namespace that holds the mount and the auth method."""
    mount: MountPath = "pki"
    """Where the PKI secrets engine is mounted; may contain slashes."""
    role: Name | None = None
    """Role that signs for both ends: server_flag and client_flag, as roles have by default."""
    server_role: Name | None = None
    """Role that signs the certificates of servers, instead of role; needs server_flag only."""
    guest_role: Name | None = None
    """Role that signs the certificates of guests, instead of role; needs client_flag only."""
    peer_role: Name | None = None
    """Role that signs for workloads that are server and client, instead of role; needs both flags."""
    issuer: Name | None = None
    """Name or id of the issuer in the mount; by default the one of the role."""
    trust: str | None = None
    """PEM file of the trust anchors, instead of the topmost CA certificate that the mount knows."""
    auth: AuthSettings
    """How to log in."""
    timeout: PositiveDuration = timedelta(seconds=10)
    """How long one request may take."""
    retry_for: Duration = timedelta(seconds=30)
    """For how long failures that can pass are tried again, in total per operation; 0s for never."""

    def role_for(self, profile: Profile) -> str:
        """Name the role for a profile; empty where the settings name none."""
        special = {
            Profile.SERVER: self.server_role,
            Profile.GUEST: self.guest_role,
            Profile.PEER: self.peer_role,
        }
        return special[profile] or self.role or ""

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """What roles are named for: a build's two ends, and peers if they have a role of their own."""
        return (*Profile, Profile.PEER) if self.peer_role else tuple(Profile)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, each once, the server's first."""
        return tuple(dict.fromkeys(map(self.role_for, self.profiles)))

    @property
    def in_namespace(self) -> str:
        """The option that makes ``bao`` look into the namespace."""
        return f" -namespace={self.namespace}" if self.namespace else ""

    def sign_path(self, profile: Profile) -> str:
        """Path that signs for one end."""
        where = f"{self.mount}/issuer/{self.issuer}" if self.issuer else self.mount
        return f"{where}/sign/{self.role_for(profile)}"


def settings_notes(settings: VaultSettings) -> Iterator[Note]:
    """Say what is wrong with the settings as a whole."""
    yield from _role_notes(settings)
    tls = settings.tls
    if (tls.cert_file is None) != (tls.key_file is None):
        missing = "cert_file" if tls.cert_file is None else "key_file"
        yield _fatal(f"tls.{missing}", "a client certificate needs both cert_file and key_file")
    elif isinstance(settings.auth, CertAuth) and tls.cert_file is None:
        yield _fatal("tls.cert_file", "this setting is required to log in with a certificate")
    for address in settings.address:
        path = urlsplit(address).path
        if path.split("/")[1:2] in (["v1"], ["ui"]):
            bare = address.removesuffix(path)
            hint = f"leave it out: {bare}; unless a proxy has Vault there"
            yield Note(f"{path} comes before /v1/… in each request", "address", hint)
    plain = [address for address in settings.address if address.startswith("http://")]
    if plain and (isinstance(settings.auth, CertAuth) or tls != TLSSettings()):
        yield Note(f"plain http to {plain[0]} has no use for the settings of tls", "tls")
    if settings.retry_for > _LONG:
        yield Note(
            f"{write_duration(settings.retry_for)} may be more than ca.call_timeout (60s by default)",
            "retry_for",
            "keep it well below, or raise ca.call_timeout",
        )


def _role_notes(settings: VaultSettings) -> Iterator[Note]:
    for profile in Profile:
        if not settings.role_for(profile):
            hint = "set role, or server_role and guest_role; `firebuild ca vault-setup --print` makes them"
            yield _fatal(f"{profile}_role", f"no role signs the certificate of the {profile}", hint)
    if settings.server_role and settings.guest_role and settings.role:
        yield Note("it is not used, because server_role and guest_role are set", "role")


def _fatal(path: str, message: str, hint: str | None = None) -> Note:
    return Note(message, path, hint, NoteLevel.FATAL)
