"""TLS to a registry: whose CA vouches for it, client certificates, and who issued what is refused."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.registry.settings import RegistrySettings
from firebuild_pki import CAError
from firebuild_pki.connections import client_context, load_pair, read_anchors
from firebuild_pki.display import one_line


def tls_anchors(host: str, settings: RegistrySettings, provider: Callable[[], str]) -> str:
    """Return the CA certificates in PEM that vouch for a registry beside those of the system.

    Args:
        provider: returns those of this build's CA provider.

    Raises:
        InputError: the file of `ca_file` can't be used.
    """
    found = []
    if settings.ca_file is not None:
        with _in_words(host):
            found.append(read_anchors(settings.ca_file, "ca_file"))
    if settings.ca == "provider":
        found.append(provider())
    return "\n".join(found)


def tls_context(
    host: str, settings: RegistrySettings, anchors: str, environ: Mapping[str, str] | None
) -> ssl.SSLContext:
    """Return the TLS of connections to a registry; verification is always on.

    Args:
        anchors: see `tls_anchors`.
        environ: where the passphrase of a key may be; None for no client certificate.

    Raises:
        InputError: a file can't be used.
    """
    context = client_context()
    if anchors:
        context.load_verify_locations(cadata=anchors)
    if environ is not None and settings.cert_file and settings.key_file:
        with _in_words(host):
            passphrase = settings.key_passphrase.resolve(environ) if settings.key_passphrase else ""
            load_pair(context, settings.cert_file, settings.key_file, passphrase)
    return context


@contextmanager
def _in_words(host: str) -> Iterator[None]:
    try:
        yield
    except CAError as error:
        raise InputError(f"registries.hosts of {host}: {error.message}", hint=error.hint) from None


def missing_issuer(url: str, anchors: str) -> str:
    """Return the name of who issued a certificate that was refused, or nothing where that can't be found out.

    Python's ssl does not tell whose certificate it refused. So the handshake is made once more, with the same
    trust, and ends at the same place.
    """
    from cryptography import x509
    from OpenSSL import SSL, crypto

    found: list[str] = []

    def look(_: object, certificate: Any, error: int, _depth: int, _ok: int) -> bool:
        if error:
            found.append(certificate.to_cryptography().issuer.rfc4514_string())
        return not error

    parts = urlsplit(url)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_default_verify_paths()
    for anchor in x509.load_pem_x509_certificates(anchors.encode()) if anchors else ():
        store = context.get_cert_store()
        if store is not None:
            store.add_cert(crypto.X509.from_cryptography(anchor))
    context.set_verify(SSL.VERIFY_PEER, look)
    with (
        suppress(SSL.Error, OSError, ValueError),
        socket.create_connection((parts.hostname or "", parts.port or 443), 5.0) as plain,
    ):
        connection = SSL.Connection(context, plain)
        connection.set_tlsext_host_name((parts.hostname or "").encode())
        plain.settimeout(None)
        # pyOpenSSL wants a blocking socket; this bounds it all the same.
        seconds = (5).to_bytes(8, "little") + bytes(8)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        connection.set_connect_state()
        connection.do_handshake()
    return one_line(found[0], 200) if found else ""


def ca_anchors(settings: Any, *, check: Callable[[], None], report: Callable[[str], None]) -> str:
    """Return the CA certificates of this build's provider, in PEM.

    Args:
        settings: the section `ca`.
        check: called again and again while the provider is waited for; what it raises ends the wait.
        report: told what it is waited for.

    Raises:
        InputError: the provider has none beyond a build.
        firebuild_pki.CAError: it fails.
    """
    from firebuild_pki import open_authority

    if settings.provider == "embedded":
        raise InputError(
            "registries.hosts: ca: provider needs a provider whose CA outlives a build, and this is embedded",
            hint="set ca_file instead, or ca.provider to file or vault",
        )
    with open_authority(settings, check=check, report=report) as authority:
        return authority.trust_pem.decode("ascii")
