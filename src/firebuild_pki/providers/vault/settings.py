"""Settings of ``ca.vault``."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from firebuild_pki.provider import Note, NoteLevel, Profile
from firebuild_pki.providers.vault.addresses import check_address
from firebuild_pki.providers.vault.auth_settings import AuthSettings, CertAuth, MountPath, Name
from firebuild_pki.settings import Duration, PositiveDuration, SecretRef, Settings, write_duration

_LONG = timedelta(seconds=50)


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
        """Name the role for one end; empty where the settings name none."""
        special = self.server_role if profile is Profile.SERVER else self.guest_role
        return special or self.role or ""

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, each once, the server's first."""
        return tuple(dict.fromkeys(self.role_for(profile) for profile in Profile))

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
