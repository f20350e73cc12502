"""The TLS context of the connection to Vault."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

from firebuild_pki.errors import CAError
from firebuild_pki.providers.vault.settings import TLSSettings


def make_context(settings: TLSSettings, environ: Mapping[str, str]) -> ssl.SSLContext:
    """Read the files of the settings; verification is always on.

    Raises:
        CAError: a file is missing, unreadable, of the wrong kind, or readable by everybody.
    """
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=_anchors(settings.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Not what this Python takes for granted: since 3.13 it refuses authorities without key identifiers,
    # which RFC 5280 wants and many private ones lack, and takes an intermediate as an anchor.
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    if settings.cert_file and settings.key_file:
        certificate, key = os.path.expanduser(settings.cert_file), os.path.expanduser(settings.key_file)
        _must_be_private(key)
        _load_pair(context, certificate, key, _passphrase(settings, environ))
    return context


def read_text(path: str, setting: str) -> str:
    """Read a text file that a setting names.

    Raises:
        CAError: it cannot be read, or is not text.
    """
    try:
        return Path(path).expanduser().read_text(encoding="ascii")
    except OSError as error:
        message = f"cannot read the file {path} of {setting}: {error.strerror}"
        raise CAError(message) from error
    except UnicodeDecodeError:
        raise CAError(f"expected PEM text in the file {path} of {setting}, found other data") from None


def _anchors(path: str | None) -> str | None:
    if path is None:
        return None
    text = read_text(path, "tls.ca_file")
    try:
        ssl.create_default_context(cadata=text or "-")
    except (ssl.SSLError, ValueError):
        raise CAError(f"expected PEM certificates in the file {path} of tls.ca_file, found none") from None
    return text


def _must_be_private(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        message = f"cannot read the file {path} of tls.key_file: {error.strerror}"
        raise CAError(message) from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise CAError(
            f"the private key {path} of tls.key_file is open to every user (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 {path}",
        )


def _passphrase(settings: TLSSettings, environ: Mapping[str, str]) -> str:
    return settings.key_passphrase.resolve(environ) if settings.key_passphrase else ""


def _load_pair(context: ssl.SSLContext, certificate: str, key: str, passphrase: str) -> None:
    try:
        # without a password OpenSSL would ask for one at the terminal
        context.load_cert_chain(certificate, key, password=lambda: passphrase)
    except ssl.SSLError as error:
        raise CAError(
            f"the client certificate {certificate} and the key {key} cannot be used: {_reason(error)}",
            hint="look at tls.cert_file, tls.key_file and, for an encrypted key, tls.key_passphrase",
        ) from None
    except OSError as error:
        message = f"cannot read the client certificate {certificate} or its key {key}: {error.strerror}"
        raise CAError(message) from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "neither is in the PEM format").replace("_", " ").lower()
