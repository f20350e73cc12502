"""Certificates and keys of the operator, each with the file or the store that it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import PublicKeyAlgorithmOID

from firebuild_pki.chain import (
    MIN_RSA_BITS,
    OTHER_KEY,
    Links,
    describe,
    error_message,
    is_self_signed,
    key_problem,
    order_issuers,
    read_certificate,
    signature_problem,
    spelling_problem,
    unreadable_part,
)
from firebuild_pki.errors import CAError, KeyStoreError, SecretError
from firebuild_pki.keys import CURVES, CAPrivateKey, MLDSAPrivateKey, is_unknown, kind_of_key, ml_dsa_key
from firebuild_pki.keystores import OpenKey, open_key
from firebuild_pki.leaf_checks import is_ca
from firebuild_pki.pem_files import (
    CERTIFICATE_LABELS,
    KEY_LABELS,
    Block,
    Source,
    blocks_in,
    read,
    reencrypt_hint,
)
from firebuild_pki.provider import ProviderContext
from firebuild_pki.providers.file.settings import FileSettings
from firebuild_pki.settings import SecretRef
from firebuild_pki.values import dataclass
from firebuild_pki.verify import public_key_bytes

_MOST_PATHS = 64
_MOST_STEPS = 2000
"""Certificates that are looked at on all ways up: CAs that sign each other have ways without number."""


@dataclass(frozen=True, slots=True)
class LoadedKey:
    """A private key out of a file, or in a key store.

    Args:
        source: the file, or the URI.
        key: the key itself.
        encrypted: whether a passphrase was needed.
        opened: what the store gave, to be closed; None for a file.
    """

    source: Source
    key: CAPrivateKey
    encrypted: bool
    opened: OpenKey | None = None

    def close(self) -> None:
        """Let go of a key that is in a store."""
        if self.opened is not None:
            self.opened.close()

    def __repr__(self) -> str:
        return f"LoadedKey({str(self.source)!r}, {kind_of_key(self.key.public_key())!r})"


def open_stored_key(source: Source, secret: SecretRef | None, context: ProviderContext) -> LoadedKey:
    """Open a key that stays in its store.

    Raises:
        CAError: there is no such store, it cannot open the key, or the key is of a kind that cannot be used.
    """
    try:
        opened = open_key(source.path, secret, context)
    except KeyStoreError as error:
        error.message = f"{source.setting} {error.message}"
        raise
    try:
        return LoadedKey(source, _usable(source, opened.key, CURVES), encrypted=False, opened=opened)
    except CAError:
        opened.close()
        raise


def load_key(
    source: Source,
    passphrase: SecretRef | None,
    environ: Mapping[str, str],
    *,
    curves: Mapping[str, str] = CURVES,
) -> LoadedKey:
    """Read the private key in a file.

    Args:
        source: the file; certificates beside the key are left out.
        passphrase: where the passphrase is, if the key needs one.
        environ: where the reference looks.
        curves: the elliptic curves that will do, and their names.

    Raises:
        CAError: there is not exactly one key, it is of a kind that cannot be used, the passphrase
            is missing or wrong, or others can read the file.
    """
    content = read(source)
    found = blocks_in(source, content.data, KEY_LABELS, "a private key")
    content.must_be_private()
    if len(found) > 1:
        raise source.wrong(f"expected one private key, found {len(found)}", "split the file")
    block = found[0]
    encrypted = block.label == "ENCRYPTED PRIVATE KEY" or b"4,ENCRYPTED" in block.pem
    secret = _passphrase(source, passphrase, environ) if encrypted else None
    return LoadedKey(source, _usable(source, _decoded(source, block, secret), curves), encrypted)


def _passphrase(source: Source, reference: SecretRef | None, environ: Mapping[str, str]) -> bytes:
    setting = f"{source.setting}_passphrase"
    if reference is None:
        hint = f"set {setting} to {{env: NAME}} or {{file: PATH}}"
        raise source.wrong("the key is encrypted, and there is no passphrase for it", hint)
    try:
        return reference.resolve(environ).encode()
    except SecretError as error:
        raise SecretError(f"{setting}: {error.message}", hint=error.hint) from error


def _decoded(source: Source, block: Block, passphrase: bytes | None) -> PrivateKeyTypes:
    # the reasons are not passed on: they may quote what is in the file
    try:
        return serialization.load_pem_private_key(block.pem, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        try:
            if (key := ml_dsa_key(block.pem, passphrase)) is not None:
                return key
        except ValueError as seedless:
            hint = "use the file that openssl genpkey wrote, or make a new key"
            raise source.wrong(str(seedless), hint) from None
        unknown = is_unknown(error)
    if unknown:
        anew = reencrypt_hint(source)
        raise source.wrong("the key is of an unknown kind, or encrypted in an unknown way", anew)
    if passphrase is not None:
        hint = f"try it: openssl pkey -in {source.quoted} -noout"
        raise source.wrong(f"{source.setting}_passphrase does not decrypt the key", hint)
    raise source.wrong("the private key in it is damaged", "copy it again from where it was made")


def _usable(source: Source, key: PrivateKeyTypes, curves: Mapping[str, str]) -> CAPrivateKey:
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= MIN_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return key
    if isinstance(key, MLDSAPrivateKey) and curves is CURVES:
        return key
    wanted = f"an RSA key of {MIN_RSA_BITS} bits or more, or an EC key on {' or '.join(curves.values())}"
    if curves is CURVES:
        wanted += ", or ML-DSA"
    found = kind_of_key(key.public_key())
    hint = "gRPC, or the check of the certificates before it, refuses every other kind"
    raise source.wrong(f"expected {wanted}, found {found}", hint)


@dataclass(frozen=True, slots=True)
class Found:
    """A certificate, and where it was."""

    certificate: x509.Certificate
    source: Source

    @property
    def name(self) -> str:
        """Subject and fingerprint, for messages."""
        return describe(self.certificate)

    @property
    def until(self) -> str:
        """The end of its validity, for messages."""
        return written(self.certificate.not_valid_after_utc)

    def fits(self, key: PublicKeyTypes) -> bool:
        """Tell whether it is for a public key."""
        return public_key_bytes(self.certificate.public_key()) == public_key_bytes(key)

    def valid_at(self, now: datetime) -> bool:
        """Tell whether a moment is within its validity."""
        certificate = self.certificate
        return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def load_certificates(source: Source) -> list[Found]:
    """Read all certificates in a file; text and keys beside them are left out.

    Raises:
        CAError: there is none, one is damaged, or others can read a private key beside them.
    """
    content = read(source)
    blocks = blocks_in(source, content.data, CERTIFICATE_LABELS, "a certificate")
    if b"PRIVATE KEY-----" in content.data:
        content.must_be_private()
    found = [_parsed(source, number, block) for number, block in enumerate(blocks, start=1)]
    return list(dict.fromkeys(found))


def certificates_of(found: Iterable[Found]) -> list[x509.Certificate]:
    """Drop where they were."""
    return [one.certificate for one in found]


def must_be_ca(found: Found) -> None:
    """Refuse what may not sign certificates (RFC 5280 sections 4.2.1.3 and 4.2.1.9).

    Raises:
        CAError: no CA, or its key usage lacks keyCertSign.
    """
    certificate, source = found.certificate, found.source
    if certificate.version is x509.Version.v1:
        hint = "version 1 knows no CAs: reissue it as version 3, with the same key and subject"
        raise source.wrong(f"{found.name} is an X.509 certificate of version 1", hint)
    if not is_ca(certificate):
        hint = "name the CA's certificate, not one that it issued; a CA has basicConstraints=critical,CA:TRUE"
        raise source.wrong(f"{found.name} is not a CA", hint)
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        hint = "reissue it with keyUsage=critical,keyCertSign,cRLSign"
        raise source.wrong(f"the key usage of {found.name} lacks keyCertSign", hint)


def must_have_good_key(found: Found) -> None:
    """Refuse a CA below which no path holds, before anything is signed with its key.

    Raises:
        CAError: with the reason.
    """
    problem = key_problem(found.certificate)
    if problem is not None:
        hint = "have it reissued: openssl ecparam -genkey -name prime256v1 -noout makes a key that will do"
        raise found.source.wrong(f"{found.name} {problem}", hint)


def must_be_valid(found: Found, now: datetime) -> None:
    """Refuse what expired, or is not valid yet.

    Raises:
        CAError: with the file, the dates, and what to do.
    """
    source, today = found.source, written(now)
    start = found.certificate.not_valid_before_utc
    if now < start:
        raise source.wrong(
            f"{found.name} is not valid before {written(start)}, now is {today}",
            "compare the clocks of this machine and of the CA",
        )
    if not found.valid_at(now):
        raise source.wrong(f"{found.name} expired at {found.until}, now is {today}", "renew it")


def written(moment: datetime) -> str:
    """Write a moment in UTC the way the framework's messages do."""
    return f"{moment:%Y-%m-%d %H:%M:%SZ}"


def for_key(key: LoadedKey, among: Sequence[Found], elsewhere: Iterable[Found], now: datetime) -> list[Found]:
    """Pick the certificates that a key belongs to.

    Args:
        key: the private key.
        among: the certificates in the file where it should be.
        elsewhere: certificates of other settings, to recognise swapped files.
        now: the current time.

    Returns:
        At least one; of several (renewed, cross-signed) the one that is valid longest first.

    Raises:
        CAError: the key fits none of them, or its certificate restricts it to RSA-PSS.
    """
    public = key.key.public_key()
    fitting = [one for one in among if one.fits(public)]
    if not fitting:
        raise _misfit(key, among, [one for one in elsewhere if one.fits(public)])
    fitting.sort(key=lambda one: (one.valid_at(now), one.certificate.not_valid_after_utc), reverse=True)
    best = fitting[0]
    if best.certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        hint = "make a key with: openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072"
        raise best.source.wrong(f"the key of {best.name} is for RSA-PSS only, which gRPC cannot use", hint)
    return fitting


def _misfit(key: LoadedKey, among: Sequence[Found], elsewhere: Sequence[Found]) -> CAError:
    names = " and ".join(one.name for one in among)
    source = among[0].source
    certificate = f"openssl x509 -in {source.quoted} -noout -pubkey"
    hint = f"these two have to print the same: openssl pkey -in {key.source.quoted} -pubout; {certificate}"
    if key.opened is not None:
        hint = f"the store has to show the public key that this prints: {certificate}"
    if elsewhere:
        hint = f"it fits {elsewhere[0].name} in {elsewhere[0].source}"
    return key.source.wrong(f"the key does not fit {names} in {source}", hint)


def _parsed(source: Source, number: int, block: Block) -> Found:
    try:
        certificate = read_certificate(block.pem)
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        hint = "copy it again from where it was made"
        raise source.wrong(
            f"certificate {number} in it cannot be read: {error_message(error)}", hint
        ) from error
    if unread := unreadable_part(certificate):
        part, reason = unread
        hint = (
            "some TLS libraries read it all the same, the checks before a build do not: have it reissued; "
            f"openssl x509 -in {source.quoted} -noout -text shows it"
        )
        message = f"certificate {number} in it cannot be read: its {part}: {error_message(reason)}"
        raise source.wrong(message, hint) from reason
    return Found(certificate, source)


@dataclass(frozen=True, slots=True)
class Pool:
    """The CA certificates that the settings name.

    Args:
        known: those in ca_cert and chain; strays do no harm.
        anchors: those in anchors.
        otherwise: the anchors where there are neither these nor roots among the known ones.
    """

    known: tuple[Found, ...]
    anchors: tuple[Found, ...]
    otherwise: tuple[Found, ...]

    @property
    def trusted(self) -> Sequence[Found]:
        """What a chain may end at, expired or not."""
        return (
            self.anchors or [one for one in self.known if is_self_signed(one.certificate)] or self.otherwise
        )


@dataclass(frozen=True, slots=True)
class Path:
    """How a certificate is anchored.

    Args:
        issuers: what peers need between it and the anchor, from the bottom up.
        anchors: what they trust.
        reached: that of the anchors to which it leads.
    """

    issuers: tuple[Found, ...]
    anchors: tuple[Found, ...]
    reached: Found


def load_pool(settings: FileSettings, ca_cert: Sequence[Found]) -> Pool:
    """Read chain and anchors.

    Raises:
        CAError: a file cannot be used, or an anchor is not a CA.
    """
    known = list(ca_cert)
    if settings.chain is not None:
        known += load_certificates(Source("chain", settings.chain))
    anchors = [one for path in settings.anchors for one in load_certificates(Source("anchors", path))]
    for anchor in anchors:
        must_be_ca(anchor)
    return Pool(tuple(known), tuple(anchors), tuple(ca_cert))


def find_paths(start: Found, pool: Pool, now: datetime, *, beside: Sequence[Found] = ()) -> list[Path]:
    """Lead a certificate to an anchor; a cross-signed CA has several ways there.

    An expired anchor can vouch for nothing, so it is left out while there are others.

    Args:
        start: the certificate.
        pool: what the settings name.
        now: the current time.
        beside: more certificates that may be between the two; never trusted.

    Returns:
        At least one path; the one that can be used for longest first.

    Raises:
        CAError: an issuer is missing, is not a CA, or is not valid now.
    """
    anchors = [one for one in pool.trusted if one.valid_at(now)]
    if not anchors:
        must_be_valid(pool.trusted[0], now)
    itself = next((one for one in anchors if one.certificate == start.certificate), None)
    if itself is not None:
        return [_path(pool, (), anchors, itself)]
    known = [*pool.known, *beside]
    paths, reasons = [], []
    valid = [one for one in known if one.valid_at(now)]
    for route in islice(_routes(start, valid, anchors, iter(range(_MOST_STEPS))), _MOST_PATHS):
        try:
            for one in route:
                must_be_ca(one)
        except CAError as error:
            reasons.append(error)
        else:
            paths.append(_path(pool, route[:-1], anchors, route[-1]))
    if paths:
        return paths
    if reasons:
        raise reasons[0]
    # the way there may lead over something that expired: say so rather than "missing"
    for one in next(_routes(start, known, pool.trusted, iter(range(_MOST_STEPS))), ()):
        must_be_valid(one, now)
    raise _broken(start, known, anchors)


def _routes(
    start: Found, known: Sequence[Found], anchors: Sequence[Found], steps: Iterator[int]
) -> Iterator[tuple[Found, ...]]:
    """Find the issuers of a certificate up to and with an anchor; cross-signed CAs have several.

    Args:
        start: the certificate.
        known: what may be above it.
        anchors: where a way may end.
        steps: one is taken for each certificate on each way; there is no other way when they are used up.
    """
    if next(steps, None) is None:
        return
    for anchor in _latest_first(anchors):
        if _issued(start, anchor):
            yield (anchor,)
    rest = [one for one in known if one.certificate != start.certificate]
    for issuer in _latest_first(rest):
        if not is_self_signed(issuer.certificate) and _issued(start, issuer):
            for above in _routes(issuer, rest, anchors, steps):
                yield (issuer, *above)


def _latest_first(found: Sequence[Found]) -> list[Found]:
    # of several editions of a CA, the one that ends last covers the longest build
    return sorted(found, key=lambda one: one.certificate.not_valid_after_utc, reverse=True)


def _issued(below: Found, above: Found) -> bool:
    return Links().problem(below.certificate, above.certificate) is None


def _path(pool: Pool, issuers: tuple[Found, ...], anchors: Sequence[Found], reached: Found) -> Path:
    # a root in a bundle is not trusted just for being there
    return Path(issuers, tuple(anchors) if pool.anchors else (reached,), reached)


def _broken(start: Found, known: Sequence[Found], anchors: Sequence[Found]) -> CAError:
    issuers = order_issuers(start.certificate, certificates_of(known))
    last = issuers[-1] if issuers else start.certificate
    problem = signature_problem(last)
    if problem is not None:
        return start.source.wrong(
            f"{describe(last)} {problem}",
            "have it reissued; a CA can also be named in anchors, where its signature does not count",
        )
    for one in (*known, *anchors):  # the issuer may be there, with a key that nobody accepts
        if one.certificate.subject == last.issuer and one.certificate != last:
            must_have_good_key(one)
            problem = Links().problem(last, one.certificate)
            if problem not in {None, OTHER_KEY}:
                hint = "have it reissued: TLS libraries take the two for unrelated"
                raise start.source.wrong(f"{describe(last)} does not lead to {one.name}: {problem}", hint)
        if spelling := spelling_problem(last, one.certificate):
            raise start.source.wrong(spelling.message, spelling.hint)
    wanted = last.issuer.rfc4514_string() or "no name"
    trusted = " and ".join(f"{one.name} in {one.source}" for one in anchors[:10])
    return start.source.wrong(
        f'the chain does not reach an anchor: {describe(last)} was issued by "{wanted}", which is neither '
        f"in ca_cert nor in chain; the anchors are {trusted}",
        "add the certificate of that issuer to chain, or name the highest CA that you do have in anchors",
    )
