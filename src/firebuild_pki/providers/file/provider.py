"""The provider ``file``: reads the operator's files once, then signs or hands out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, replace
from datetime import datetime, timedelta
from functools import cached_property

from cryptography import x509

from firebuild_pki.chain import Chain, Links
from firebuild_pki.display import counted
from firebuild_pki.errors import (
    AuthorityClosed,
    CAError,
    KeyStoreError,
    MaterialError,
    UnsupportedOperation,
)
from firebuild_pki.keys import generate_key, kind_of_key
from firebuild_pki.keystores import check_key_uri, scheme_of
from firebuild_pki.pem_files import Source
from firebuild_pki.provider import (
    Capability,
    CAProvider,
    Note,
    NoteLevel,
    Profile,
    ProviderContext,
    ReadyPair,
    SignedCertificate,
    SignRequest,
    TrustBundle,
)
from firebuild_pki.providers.file.certificates import (
    Found,
    LoadedKey,
    Path,
    Pool,
    certificates_of,
    find_paths,
    for_key,
    load_certificates,
    load_key,
    load_pool,
    must_be_ca,
    must_be_valid,
    must_have_good_key,
    open_stored_key,
)
from firebuild_pki.providers.file.pairs import ReadyPairs, load_ready_pairs
from firebuild_pki.providers.file.settings import FileSettings, Mode, mode_of, notes_about
from firebuild_pki.rfc5280 import authority_problem, name_problem, policy_problem, restricts_subjects
from firebuild_pki.values import dataclass
from firebuild_pki.verify import Expectation, Trust, verify_certificate
from firebuild_pki.x509 import USAGE, Issuer, Validity, make_leaf, to_pem

SOON = timedelta(days=30)
"""A certificate that ends sooner than this gets a warning."""


def diagnostics(opened: SigningCA | ReadyPairs, settings: FileSettings, now: datetime) -> Iterator[Note]:
    """Describe what was read: a note for each thing, warnings for what expires soon.

    Args:
        opened: what `open` read.
        settings: to notice what has no effect.
        now: the current time.
    """
    if isinstance(opened, SigningCA):
        yield from _about_ca(opened, settings, now)
    else:
        yield from _about_pairs(opened, settings, now)


def _about_ca(opened: SigningCA, settings: FileSettings, now: datetime) -> Iterator[Note]:
    ca, reached = opened.ca, opened.path.reached
    kind = kind_of_key(ca.certificate.public_key())
    yield _ok("ca", f"{ca.name} signs with {kind}, valid until {ca.until}", "ca_cert")
    yield from _about_key("key", opened.key, ca, given=settings.ca_key_passphrase is not None)
    text = f"the chain leads to {reached.name}, valid until {reached.until}"
    yield _ok("anchor", text if opened.chain else "the CA itself is the anchor", reached.source.setting)
    above = {one.certificate: one for one in (reached, *opened.path.issuers, ca)}
    yield from _expiring("ca", above.values(), now, SOON)


def _about_pairs(opened: ReadyPairs, settings: FileSettings, now: datetime) -> Iterator[Note]:
    given = {
        Profile.SERVER: settings.server_key_passphrase is not None,
        Profile.GUEST: settings.client_key_passphrase is not None,
    }
    for profile, about in ((Profile.SERVER, "server"), (Profile.GUEST, "client")):
        pair = opened.of(profile)
        text = f"{pair.leaf.name} for {pair.name}, valid until {pair.leaf.until}"
        yield _ok(about, text, pair.leaf.source.setting)
        yield from _about_key(f"{about} key", pair.key, pair.leaf, given=given[profile])
        yield from _expiring(about, [pair.leaf], now, _third_of_life(pair.leaf))
    for anchor in opened.anchors:
        yield _ok("anchor", f"{anchor.name}, valid until {anchor.until}", anchor.source.setting)
    yield from _expiring("anchor", opened.anchors, now, SOON)


def _about_key(about: str, key: LoadedKey, owner: Found, *, given: bool) -> Iterator[Note]:
    setting = key.source.setting
    if key.opened is not None:
        yield _ok(about, f"the key {key.source.path} fits {owner.name}; it stays in its store", setting)
        return
    state = "encrypted" if key.encrypted else "not encrypted"
    yield _ok(about, f"the key in {key.source.real_path} fits {owner.name}; it is {state}", setting)
    if given and not key.encrypted:
        setting = f"{setting}_passphrase"
        yield Note(f"has no effect: the key in {key.source.real_path} is not encrypted", setting, about=about)


def _expiring(about: str, found: Iterable[Found], now: datetime, soon: timedelta) -> Iterator[Note]:
    for one in found:
        left = one.certificate.not_valid_after_utc - now
        if left < soon:
            text = f"{one.name} in {one.source.real_path} expires at {one.until}, in {_about_how_long(left)}"
            yield Note(text, one.source.setting, "renew it", about=about)


def _third_of_life(found: Found) -> timedelta:
    # certificates that are renewed every day are not about to expire all the time
    life = found.certificate.not_valid_after_utc - found.certificate.not_valid_before_utc
    return min(SOON, life / 3)


def _about_how_long(left: timedelta) -> str:
    return counted(left.days, "day") if left.days > 1 else f"{left.total_seconds() / 3600:.0f} hours"


def _ok(about: str, message: str, path: str) -> Note:
    return Note(message, path, level=NoteLevel.OK, about=about)


class FileProvider(CAProvider):
    """A CA that signs, or two finished certificates; the settings decide.

    What `open` read is what counts: files that are replaced later do not matter.
    """

    def __init__(self, settings: FileSettings, context: ProviderContext) -> None:
        self._settings = settings
        self._context = context
        self._mode = mode_of(settings)
        self._ca: SigningCA | None = None
        self._pairs: ReadyPairs | None = None

    def capabilities(self) -> frozenset[Capability]:
        """SIGN with a CA's key, READY_PAIRS with finished certificates."""
        if self._mode is Mode.PAIRS:
            return frozenset({Capability.READY_PAIRS})
        return frozenset({Capability.SIGN, Capability.URI_NAMES, Capability.PEER})

    def validate(self) -> Sequence[Note]:
        """Name what is missing, or of both modes."""
        return (*notes_about(self._settings), *self._stored_key_notes())

    def open(self) -> None:
        """Read all files and check that they belong together."""
        if self._mode is Mode.PAIRS:
            self._pairs = load_ready_pairs(self._settings, self._context)
        else:
            self._ca = load_signing_ca(self._settings, self._context)

    def close(self) -> None:
        """Forget the keys; one in a store is closed."""
        ca, self._ca, self._pairs = self._ca, None, None
        if ca is not None:
            ca.key.close()

    def check(self) -> Sequence[Note]:
        """Tell what was read, and what expires soon."""
        return tuple(diagnostics(self._opened(), self._settings, self._context.clock()))

    def trust_bundle(self) -> TrustBundle:
        """Return the anchors, and the CA certificates between them and the leaves."""
        return self._opened().trust_bundle

    def sign(self, request: SignRequest) -> SignedCertificate:
        """Sign the key of the request; the names are those of the request, not of the CSR."""
        if self._mode is Mode.PAIRS:
            raise UnsupportedOperation("finished certificates sign nothing")
        ca, now = self._signing(), self._context.clock()
        lifetime = min(request.ttl, self._settings.leaf_lifetime)
        validity = Validity.starting(now, lifetime, backdate=self._settings.backdate)
        leaf = ca.sign(request, validity, now)
        return SignedCertificate(to_pem([leaf]), ca.chain_pem, _capped(ca.ca, now + lifetime))

    def ready_pair(self, profile: Profile) -> ReadyPair:
        """Return the pair of one end."""
        if self._mode is Mode.SIGN:
            return super().ready_pair(profile)
        if self._pairs is None:
            raise _not_open()
        return self._pairs.ready_pair(profile)

    def _stored_key_notes(self) -> Iterator[Note]:
        key = self._settings.ca_key
        if key is not None and scheme_of(key) is not None:
            try:
                check_key_uri(key, self._context)
            except KeyStoreError as error:
                yield Note(error.message, "ca_key", error.hint, NoteLevel.FATAL)

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


@dataclass(frozen=True)
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

    @cached_property
    def nameless(self) -> bool:
        """Whether leaves have no subject, because one of the CAs above permits certain ones only."""
        return restricts_subjects(certificates_of((self.ca, *self.path.issuers, self.path.reached)))

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
            uri_names=request.uri_names,
            nameless=self.nameless,
        )
        self._must_hold(leaf, request, now)
        return leaf

    def _must_hold(self, leaf: x509.Certificate, request: SignRequest, now: datetime) -> None:
        # the framework checks this again; here the file can be named
        anchors, between = certificates_of(self.path.anchors), certificates_of(self.chain)
        trust = Trust(tuple(anchors), tuple(between), links=self.links)
        names, uris = request.dns_names, request.uri_names
        expected = Expectation(request.profile, names, leaf.public_key(), now, deadline=now, uris=uris)
        try:
            verify_certificate(to_pem([leaf]), b"", trust, expected)
        except MaterialError as error:
            source = self.ca.source
            hint = (
                "look for pathlen, name constraints, policies and extended key usage that do not allow it: "
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
        ways = _anchored(fitting, pool, now)
        signing = [SigningCA(key, ca, path) for ca, path in ways]
        if len(signing) == 1:
            return signing[0]
        return next((one for one in signing if _permits(one, context)), signing[0])
    except CAError:
        key.close()
        raise


def _anchored(fitting: Sequence[Found], pool: Pool, now: datetime) -> list[tuple[Found, Path]]:
    ways, reasons = [], []
    for ca in fitting:  # several if the CA is cross-signed
        try:
            must_be_ca(ca)
            must_have_good_key(ca)
            must_be_valid(ca, now)
            ways += [(ca, path) for path in find_paths(ca, replace(pool, otherwise=(ca,)), now)]
        except CAError as error:
            reasons.append(error)
    if not ways:
        raise reasons[0]
    return ways


def _permits(signing: SigningCA, context: ProviderContext) -> bool:
    """Tell whether certificates with the names of a build are allowed below a CA, on one of its ways up."""
    domain = context.domain or (f"build.{context.name_suffix}" if context.name_suffix else "")
    names = [name for name in context.names if "://" not in name]
    names += [domain, f"guest.{domain}"] if domain else []
    uris = [name for name in context.names if "://" in name]
    if not names and not uris:
        return True
    key = generate_key()  # nothing is signed for a trial
    issuer = Issuer(signing.ca.certificate, key)
    validity = Validity.starting(context.clock(), timedelta(hours=1), backdate=timedelta(0))
    issuers = tuple(certificates_of(signing.chain))
    for profile in Profile:
        leaf = make_leaf(
            key.public_key(),
            issuer,
            validity,
            profile=profile,
            dns_names=names,
            uri_names=uris,
            nameless=signing.nameless,
        )
        chain = Chain(leaf, issuers, signing.path.reached.certificate)
        if name_problem(chain) or policy_problem(chain) or authority_problem(chain, USAGE[profile]):
            return False
    return True
