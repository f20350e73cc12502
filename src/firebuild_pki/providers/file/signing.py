"""The first way: a CA of the operator that signs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from firebuild_pki.provider import ProviderContext, TrustBundle
from firebuild_pki.providers.file.anchors import Path, find_path, load_pool
from firebuild_pki.providers.file.certificates import (
    Found,
    certificates_of,
    for_key,
    load_certificates,
    must_be_ca,
    must_be_valid,
)
from firebuild_pki.providers.file.keys import LoadedKey, load_key
from firebuild_pki.providers.file.reading import Source
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.x509 import Issuer, to_pem


@dataclass(frozen=True, slots=True)
class SigningCA:
    """A CA, ready to sign.

    Args:
        ca: its certificate.
        key: its key.
        path: how it is anchored.
    """

    ca: Found
    key: LoadedKey
    path: Path

    @property
    def issuer(self) -> Issuer:
        """What leaves are signed with."""
        return Issuer(self.ca.certificate, self.key.key)

    @property
    def chain_pem(self) -> bytes:
        """What peers need between a leaf and the anchor."""
        return to_pem(certificates_of(self.path.issuers))

    @property
    def trust_bundle(self) -> TrustBundle:
        """The anchors, and what is between them and the leaves."""
        return TrustBundle(to_pem(certificates_of(self.path.anchors)), self.chain_pem)

    def ends_before(self, moment: datetime) -> bool:
        """Tell whether the CA expires before a moment."""
        return self.ca.certificate.not_valid_after_utc < moment


def load_signing_ca(settings: FileSettings, context: ProviderContext) -> SigningCA:
    """Read the CA's files and check that they belong together.

    Raises:
        CAError: they do not, or one of them cannot be used.
    """
    now = context.clock()
    held = load_certificates(Source("ca_cert", str(settings.ca_cert)))
    key = load_key(Source("ca_key", str(settings.ca_key)), settings.ca_key_passphrase, context.environ)
    pool = load_pool(settings, held)
    ca = for_key(key, held, (*pool.known, *pool.anchors), now)
    must_be_ca(ca)
    must_be_valid(ca, now)
    return SigningCA(ca, key, find_path(ca, pool, now))
