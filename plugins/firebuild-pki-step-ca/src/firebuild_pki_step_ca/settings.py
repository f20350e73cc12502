"""The block ``ca.step-ca``, and what can be said about it without asking the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from firebuild_pki import Duration, Note, NoteLevel, SecretRef, Settings
from pydantic import Field

MAX_ATTEMPTS = 5
"""Together with the timeout, this keeps a call from going on for ever."""


class JWKAuth(Settings):
    """A JWK provisioner: whoever has its key may ask for certificates."""

    method: Literal["jwk"]
    """Sign one-time tokens with the key of a JWK provisioner."""
    provisioner: str
    """Name of the provisioner."""
    key: SecretRef | None = None
    """Where its private key is, a JWK or PEM; by default it is the encrypted one that step-ca has."""
    password: SecretRef | None = None
    """Where the password of an encrypted key is."""


class X5CAuth(Settings):
    """An X5C provisioner: whoever has a certificate of its CA may ask for certificates."""

    method: Literal["x5c"]
    """Sign one-time tokens with the key of a certificate that an X5C provisioner accepts."""
    provisioner: str
    """Name of the provisioner."""
    cert_file: Path
    """PEM file with the certificate and its chain, without the root."""
    key_file: Path
    """PEM file with the private key of the certificate."""
    key_passphrase: SecretRef | None = None
    """Where the passphrase of an encrypted key_file is."""


class StepCASettings(Settings):
    """Settings of ``ca.step-ca``."""

    address: str
    """URL of step-ca, for example https://ca.example; always https."""
    root: Path | None = None
    """PEM file with the root of step-ca, which vouches for the server."""
    root_fingerprint: str | None = None
    """SHA-256 of that root in hexadecimal, instead of the file: the server is asked for the root."""
    auth: Annotated[JWKAuth | X5CAuth, Field(discriminator="method")]
    """How to ask for certificates."""
    timeout: Duration = timedelta(seconds=10)
    """How long connecting, and each answer, may take."""
    attempts: int = 3
    """How often a request is sent, at most 5, if the server cannot be reached or is overloaded."""

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the root as step-ca writes it: lower case, without colons; may be empty."""
        return (self.root_fingerprint or "").replace(":", "").lower()


def look_at(settings: StepCASettings) -> Iterator[Note]:
    """Say what is wrong with the settings; no I/O."""
    try:
        url = urlsplit(settings.address)
        usable = url.scheme == "https" and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in url.netloc or url.query or url.fragment or url.path.strip("/"):
        hint = "scheme, host and port: https://ca.example:9000"
        yield _wrong("address", "expected the https URL of a step-ca", hint)
    if settings.root is None and settings.root_fingerprint is None:
        hint = "name its file, or set root_fingerprint: step certificate fingerprint root_ca.crt"
        yield _wrong("root", "the root of step-ca is needed: it vouches for the server", hint)
    elif settings.root is not None and settings.root_fingerprint is not None:
        yield _wrong("root_fingerprint", "it has no effect beside root", "set one of them")
    if settings.root_fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", settings.fingerprint):
        hint = "64 hexadecimal digits: step certificate fingerprint root_ca.crt"
        yield _wrong("root_fingerprint", "expected a SHA-256 fingerprint", hint)
    auth = settings.auth
    if isinstance(auth, JWKAuth) and auth.key is None and auth.password is None:
        hint = "set auth.password, or auth.key if the key is not encrypted"
        yield _wrong("auth.password", "the key that step-ca has of a provisioner is encrypted", hint)
    if not timedelta(0) < settings.timeout:
        yield _wrong("timeout", "expected a duration above zero")
    if not 1 <= settings.attempts <= MAX_ATTEMPTS:
        yield _wrong("attempts", f"expected a number from 1 to {MAX_ATTEMPTS}, found {settings.attempts}")


def _wrong(path: str, message: str, hint: str | None = None) -> Note:
    return Note(message, path, hint, NoteLevel.FATAL)
