"""The block ``ca.cfssl``, and what can be said about it without asking the server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from firebuild_pki import Duration, Note, NoteLevel, Profile, SecretRef, Settings
from firebuild_pki.http import is_safe

MAX_ATTEMPTS = 5
"""Together with the timeout, this keeps a call from going on for ever."""


class CfsslSettings(Settings):
    """Settings of ``ca.cfssl``."""

    address: str
    """URL of the server, for example https://cfssl.example:8888. Plain http is accepted on loopback only."""
    auth_key: SecretRef
    """Where the hexadecimal key is that the server's configuration lists under auth_keys."""
    server_profile: str
    """Signing profile for server certificates; its usages have "server auth", and best not "client auth"."""
    guest_profile: str
    """Signing profile for guest certificates; its usages have "client auth", and best not "server auth"."""
    peer_profile: str = ""
    """Signing profile for workloads that are server and client: both usages. Builds do not need it."""
    label: str = ""
    """Which CA of a multirootca is meant; cfssl serve has one CA and ignores it."""
    anchors: Path | None = None
    """PEM file with what server and guest trust; by default the CA certificate that the server names."""
    ca_file: Path | None = None
    """PEM file with the CA of the server's own TLS certificate, instead of those of the system."""
    client_cert: Path | None = None
    """PEM file with this machine's certificate, for a server with -mutual-tls-ca."""
    client_key: Path | None = None
    """PEM file with the unencrypted key of client_cert."""
    timeout: Duration = timedelta(seconds=10)
    """How long connecting, and each answer, may take."""
    attempts: int = 3
    """How often a request is sent, at most 5, if the server cannot be reached or is overloaded."""

    def profile_for(self, end: Profile) -> str:
        """Name the signing profile for one end of a connection, or for peers; empty where there is none."""
        if end is Profile.PEER:
            return self.peer_profile
        return self.server_profile if end is Profile.SERVER else self.guest_profile


def look_at(settings: CfsslSettings) -> Iterator[Note]:
    """Say what is wrong with the settings; no I/O."""
    yield from _address(settings.address)
    if (settings.client_cert is None) != (settings.client_key is None):
        missing = "client_cert" if settings.client_cert is None else "client_key"
        yield _wrong(missing, "client_cert and client_key belong together, and one is missing")
    if not timedelta(0) < settings.timeout:
        yield _wrong("timeout", "expected a duration above zero")
    if not 1 <= settings.attempts <= MAX_ATTEMPTS:
        yield _wrong("attempts", f"expected a number from 1 to {MAX_ATTEMPTS}, found {settings.attempts}")
    if settings.server_profile == settings.guest_profile:
        hint = "each certificate is for one end of the connection only, so there are two profiles"
        yield _wrong("guest_profile", "expected another profile than server_profile", hint)


def _address(address: str) -> Iterator[Note]:
    try:
        url = urlsplit(address)
        usable = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in url.netloc or url.query or url.fragment:
        hint = "scheme, host and port; no user, no query"
        yield _wrong("address", "expected a URL such as https://cfssl.example:8888", hint)
    elif not is_safe(address):
        hint = "use https, with -tls-cert and -tls-key at the server"
        yield _wrong("address", f"plain http to {url.hostname}; it is accepted on loopback only", hint)


def _wrong(path: str, message: str, hint: str | None = None) -> Note:
    return Note(message, path, hint, NoteLevel.FATAL)
