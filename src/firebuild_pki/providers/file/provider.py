"""The provider ``file``: reads the operator's files once, then signs or hands out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from firebuild_pki.errors import AuthorityClosed
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Note,
    Profile,
    ProviderContext,
    ReadyPair,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.providers.file.certificates import Found
from firebuild_pki.providers.file.findings import findings
from firebuild_pki.providers.file.pairs import ReadyPairs, load_ready_pairs
from firebuild_pki.providers.file.settings import FileSettings, Way, notes_about, way_of
from firebuild_pki.providers.file.signing import SigningCA, load_signing_ca
from firebuild_pki.x509 import Validity, to_pem


class FileProvider(CAProvider):
    """A CA that signs, or two finished certificates; the settings decide.

    What `open` read is what counts: files that are replaced later do not matter.
    """

    def __init__(self, settings: FileSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._context = context
        self._way = way_of(settings)
        self._ca: SigningCA | None = None
        self._pairs: ReadyPairs | None = None

    def capabilities(self) -> frozenset[Capability]:
        """SIGN with a CA's key, READY_PAIRS with finished certificates."""
        return frozenset({Capability.READY_PAIRS if self._way is Way.PAIRS else Capability.SIGN})

    def validate(self) -> Sequence[Note]:
        """Name what is missing, or of both ways."""
        return tuple(notes_about(self._settings))

    def open(self) -> None:
        """Read all files and check that they belong together."""
        if self._way is Way.PAIRS:
            self._pairs = load_ready_pairs(self._settings, self._context)
        else:
            self._ca = load_signing_ca(self._settings, self._context)

    def close(self) -> None:
        """Forget the keys."""
        self._ca = self._pairs = None

    def check(self) -> Sequence[Note]:
        """Tell what was read, and what expires soon."""
        return tuple(findings(self._opened(), self._settings, self._context.clock()))

    def trust_bundle(self) -> TrustBundle:
        """Return the anchors, and the CA certificates between them and the leaves."""
        return self._opened().trust_bundle

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Sign the key of the request; the names are those of the request, not of the CSR."""
        if self._way is Way.PAIRS:
            return super().sign(request)
        ca, now = self._signing(), self._context.clock()
        lifetime = min(request.ttl, self._settings.leaf_lifetime)
        validity = Validity.starting(now, lifetime, backdate=self._settings.backdate)
        leaf = ca.sign(request, validity, now)
        return SignedCertificate(to_pem([leaf]), ca.chain_pem, _capped(ca.ca, now + lifetime))

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """Return the pair of one end."""
        if self._way is Way.SIGN:
            return super().ready_pair(profile)
        if self._pairs is None:
            raise _not_open()
        return self._pairs.ready_pair(profile)

    def _opened(self) -> SigningCA | ReadyPairs:
        opened = self._ca or self._pairs
        if opened is None:
            raise _not_open()
        return opened

    def _signing(self) -> SigningCA:
        if self._ca is None:
            raise _not_open()
        return self._ca


def _capped(ca: Found, wanted: datetime) -> tuple[str, ...]:
    if ca.certificate.not_valid_after_utc >= wanted:
        return ()
    return (f"{ca.name} in {ca.source} expires at {ca.until}, and what it signs with it",)


def _not_open() -> AuthorityClosed:
    return AuthorityClosed("the files are not read: the provider is not open")
