"""The section `registries` of the settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from firebuild_bootstrap.bootstrap_settings import ByteSize
from firebuild_pki.addresses import is_safe
from firebuild_pki.config import PositiveDuration, SecretRef, Settings

_HOST: Final = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?")
_PATH: Final = re.compile(r"(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")


def _refused(text: str, hint: str = "") -> PydanticCustomError:
    return PydanticCustomError("registry", "{text}", {"text": text, "hint": hint})


def port_problem(host: str) -> str:
    """Say what is wrong with the port in HOST[:PORT], whose form is right; an empty text for nothing."""
    port = host.rpartition("]")[2].partition(":")[2]
    return (
        f"expected a port from 1 to 65535, found {port:.20}" if port and not 0 < int(port) < 1 << 16 else ""
    )


def _check_place(text: str) -> str:
    host, slash, path = text.partition("/")
    if _HOST.fullmatch(host) is None or _PATH.fullmatch(slash + path) is None:
        hint = "without https:// and without a slash at the end"
        raise _refused(f'expected HOST[:PORT][/PATH] such as mirror.example:5000, found "{text:.200}"', hint)
    if problem := port_problem(host):
        raise _refused(f'{problem} in "{text:.200}"')
    return text


def _check_host(text: str) -> str:
    if "/" in _check_place(text):
        raise _refused(f'expected HOST[:PORT], found "{text:.200}"')
    return text


def _check_address(text: str) -> str:
    parts = urlsplit(text)
    wanted = "expected an address such as https://registry.example:5000"
    if parts.username is not None or parts.password is not None:
        raise _refused(f"{wanted}, found one with a user name or password (not shown)")
    if parts.scheme not in {"http", "https"} or _HOST.fullmatch(parts.netloc) is None:
        raise _refused(f'{wanted}, found "{text:.200}"')
    if problem := port_problem(parts.netloc):
        raise _refused(f'{problem} in "{text:.200}"')
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise _refused(f'{wanted}, found something after the host in "{text:.200}"')
    if not is_safe(text):
        raise _refused(
            f'expected https, found plain http to "{parts.hostname}"',
            "plain http is for loopback addresses only: 127.0.0.0/8, ::1 and localhost",
        )
    return text.rstrip("/")


Host = Annotated[str, AfterValidator(_check_host)]
"""HOST[:PORT], as images are named."""


class RegistrySettings(Settings):
    """One registry, or a mirror of one; certificates are always verified."""

    address: Annotated[str, AfterValidator(_check_address)] | None = None
    """URL where it answers; by default https and its name. Plain http on loopback addresses only."""
    mirrors: tuple[Annotated[str, AfterValidator(_check_place)], ...] = ()
    """HOST[:PORT][/PATH] of registries that are asked before it, in order; each has an entry of its own here
    for its credentials and TLS, if it needs one."""
    ca_file: str | None = None
    """PEM file of CA certificates that vouch for it, beside those of the operating system."""
    ca: Literal["system", "provider"] = "system"
    """provider: also trust the CA of builds, such as a Vault that has signed the registry's certificate."""
    cert_file: str | None = None
    """PEM file of a client certificate with its chain, where it asks for one."""
    key_file: str | None = None
    """PEM file of the client certificate's private key; other users must not be able to read it."""
    key_passphrase: SecretRef | None = None
    """Where the passphrase of an encrypted key_file is."""
    chunk_size: Annotated[ByteSize, Field(ge=1 << 20)] | None = None
    """How much of a layer is sent at a time, such as 64MiB, where the registry or a proxy before it takes no
    more; by default a layer is sent whole, and in chunks once that is refused as too large."""
    username: str | None = None
    """Who logs in, instead of whom the files of docker or podman name."""
    password: SecretRef | None = None
    """Where the password of username is."""
    token: SecretRef | None = None
    """Where an identity token (OAuth2 refresh token) is, instead of a password."""

    @model_validator(mode="after")
    def _complete(self) -> RegistrySettings:
        if (self.username is None) != (self.password is None):
            raise _refused("expected username and password together, found one of them")
        if self.username is not None and self.token is not None:
            raise _refused("expected either username and password or token, found both")
        if self.username is not None and ":" in self.username:
            raise _refused("expected a username without a colon (RFC 7617)")
        if (self.cert_file is None) != (self.key_file is None):
            raise _refused("expected cert_file and key_file together, found one of them")
        return self


class RegistriesSettings(Settings):
    """The section `registries`: where images are pulled from and pushed to."""

    default: Host = "docker.io"
    """The registry of names without one, such as debian:12."""
    namespace: Annotated[str, Field(pattern=r"^([a-z0-9]+([._-]+[a-z0-9]+)*)?$")] = "library"
    """What comes before names without a slash there: debian is library/debian. Empty for none."""
    pull: Literal["missing", "always", "never"] = "missing"
    """When to pull what FROM and --from name: missing, always or never; see --pull."""
    timeout: PositiveDuration = timedelta(seconds=30)
    """How long an answer may take to begin, a manifest to come, and a blob to come on."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 5
    """How often something is tried that was cut off, or that the registry refused for the time being."""
    connections: Annotated[int, Field(ge=1, le=16)] = 4
    """How many layers are transferred at a time."""
    hosts: Mapping[Host, RegistrySettings] = Field(default_factory=dict)
    """What is special about a registry, by HOST[:PORT]."""

    def of(self, host: str) -> RegistrySettings:
        """Return what is special about a registry."""
        return self.hosts.get(host) or RegistrySettings()
