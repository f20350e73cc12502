"""The first way: a CA of the operator that signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from cryptography import x509

from firebuild_pki.chain import Links
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.keystores import scheme_of
from firebuild_pki.provider import ProviderContext, SignRequest, TrustBundle
from firebuild_pki.providers.file.certificates import (
    Found,
    LoadedKey,
    Path,
    Pool,
    certificates_of,
    find_path,
    for_key,
    load_certificates,
    load_key,
    load_pool,
    must_be_ca,
    must_be_valid,
    open_stored_key,
)
from firebuild_pki.providers.file.reading import Source
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.verify import Expectation, Trust, verify_certificate
from firebuild_pki.x509 import Issuer, Validity, make_leaf, to_pem


@dataclass(frozen=True, slots=True)
class SigningCA:
    """A CA, ready to sign.

    Args:
        key: its key.
        ca: its certificate.
        path: how it is anchored.
        links: what is known about these CAs, from one leaf to the next.
    """

    key: LoadedKey
    ca: Found
    path: Path
    links: Links = field(default_factory=Links, compare=False, repr=False)

    @property
    def chain(self) -> tuple[Found, ...]:
        """What peers need between a leaf and the anchor."""
        return () if self.path.reached.certificate == self.ca.certificate else (self.ca, *self.path.issuers)

    @property
    def chain_pem(self) -> bytes:
        """The chain, as PEM."""
        return to_pem(certificates_of(self.chain))

    @property
    def trust_bundle(self) -> TrustBundle:
        """The anchors, and what is between them and the leaves."""
        return TrustBundle(to_pem(certificates_of(self.path.anchors)), self.chain_pem)

    def sign(self, request: SignRequest, validity: Validity, now: datetime) -> x509.Certificate:
        """Make a leaf for the key of a request.

        Raises:
            CAError: the CA expired in the meantime, or its constraints do not allow the leaf.
        """
        must_be_valid(self.ca, now)
        leaf = make_leaf(
            x509.load_pem_x509_csr(request.csr_pem).public_key(),
            Issuer(self.ca.certificate, self.key.key),
            validity,
            profile=request.profile,
            dns_names=request.dns_names,
        )
        self._must_hold(leaf, request, now)
        return leaf

    def _must_hold(self, leaf: x509.Certificate, request: SignRequest, now: datetime) -> None:
        # the framework checks this again; here the file can be named
        anchors, between = certificates_of(self.path.anchors), certificates_of(self.chain)
        trust = Trust(tuple(anchors), tuple(between), links=self.links)
        expected = Expectation(request.profile, request.dns_names, leaf.public_key(), now, deadline=now)
        try:
            verify_certificate(to_pem([leaf]), b"", trust, expected)
        except MaterialError as error:
            source = self.ca.source
            hint = (
                "look for pathlen, name constraints and extended key usage that do not allow it: "
                f"openssl x509 -in {source.quoted} -noout -text; the setting ca.name_suffix chooses the names"
            )
            raise source.wrong(error.message, error.hint or hint) from error


def load_signing_ca(settings: FileSettings, context: ProviderContext) -> SigningCA:
    """Read the CA's files and check that they belong together.

    Raises:
        CAError: they do not, or one of them cannot be used.
    """
    now = context.clock()
    held = load_certificates(Source("ca_cert", str(settings.ca_cert)))
    source, secret = Source("ca_key", str(settings.ca_key)), settings.ca_key_passphrase
    stored = scheme_of(source.path) is not None
    key = open_stored_key(source, secret, context) if stored else load_key(source, secret, context.environ)
    try:
        pool = load_pool(settings, held)
        fitting = for_key(key, held, (*pool.known, *pool.anchors), now)
        return SigningCA(key, *_anchored(fitting, pool, now))
    except CAError:
        key.close()
        raise


def _anchored(fitting: Sequence[Found], pool: Pool, now: datetime) -> tuple[Found, Path]:
    reasons = []
    for ca in fitting:  # several if the CA is cross-signed
        try:
            must_be_ca(ca)
            must_be_valid(ca, now)
            return ca, find_path(ca, replace(pool, otherwise=(ca,)), now)
        except CAError as error:
            reasons.append(error)
    raise reasons[0]
