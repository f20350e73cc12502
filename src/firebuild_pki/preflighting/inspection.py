"""What is in files: certificates, keys, requests and revocation lists, and whether they belong together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, field
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs7, pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID

from firebuild_pki.chain import (
    chain_remarks,
    describe,
    error_message,
    extension_of,
    is_self_signed,
    key_problem,
    leaf_key_problem,
    parse_certificates,
    quiet_parsing,
    serial_of,
    signature_problem,
    unreadable_part,
)
from firebuild_pki.display import counted
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.keys import is_unknown, kind_of_key, ml_dsa_key
from firebuild_pki.leaf_checks import is_ca, names_of
from firebuild_pki.pem_files import (
    CERTIFICATE_LABELS,
    CUT_OFF,
    ESCAPED,
    KEY_LABELS,
    MAX_SIZE,
    Block,
    Content,
    Foreign,
    Source,
    blocks_in,
    blocks_of,
    is_cut_off,
    labelled,
    named,
    read,
    reencrypt_hint,
)
from firebuild_pki.preflighting.report import PreflightRow, RowLevel, ok, skipped, warning
from firebuild_pki.provider import Profile, TrustBundle
from firebuild_pki.values import dataclass
from firebuild_pki.verify import (
    Expectation,
    Trust,
    out_of_date,
    public_key_bytes,
    verify_certificate,
    verify_trust,
)
from firebuild_pki.x509 import USAGE, fingerprint, to_pem

_EXTENDED = {
    ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth",
    ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth",
    ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE: "anyExtendedKeyUsage",
}
# RFC 5280 section 4.2.1.3; encipherOnly and decipherOnly only say more about keyAgreement
_USAGES = {
    "digital_signature": "digitalSignature",
    "content_commitment": "contentCommitment",
    "key_encipherment": "keyEncipherment",
    "data_encipherment": "dataEncipherment",
    "key_agreement": "keyAgreement",
    "key_cert_sign": "keyCertSign",
    "crl_sign": "cRLSign",
}


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """A certificate in words.

    Args:
        subject: distinguished name (RFC 4514); may be empty.
        issuer: distinguished name of who signed it.
        names: the subject alternative names.
        not_before: start of the validity, UTC.
        not_after: end of the validity, UTC.
        serial: serial number in hexadecimal.
        key: kind and size of the public key: ``EC secp256r1``, ``RSA 2048``.
        usages: key usage and extended key usage, by their names in RFC 5280.
        fingerprint_sha256: in hexadecimal.
    """

    subject: str
    issuer: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    serial: str
    key: str
    usages: tuple[str, ...]
    fingerprint_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {
            **asdict(self),
            "names": list(self.names),
            "not_before": self.not_before.isoformat(),
            "not_after": self.not_after.isoformat(),
            "usages": list(self.usages),
        }


def certificate_facts(pem: bytes) -> tuple[CertificateFacts, ...]:
    """Read certificates.

    Args:
        pem: one or more certificates.

    Raises:
        MaterialError: they cannot be read.
    """
    certificates = parse_certificates(pem, "input")
    try:
        return tuple(map(_facts, certificates))
    except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
        raise MaterialError(f"a certificate in the input cannot be read: {error_message(error)}") from error


def certificates_of(content: Content) -> tuple[CertificateFacts, ...]:
    """Read the certificates of a file that is to hold some; whatever else is in it is left out.

    Raises:
        CAError: there is none; names the file, and what it holds instead.
    """
    blocks = blocks_in(content.source, content.data, CERTIFICATE_LABELS, "a certificate")
    found = parse_certificates(b"\n".join(block.pem for block in blocks), str(content.source))
    return tuple(map(_facts, found))


def _facts(certificate: x509.Certificate) -> CertificateFacts:
    usage = extension_of(certificate, x509.KeyUsage)
    extended = extension_of(certificate, x509.ExtendedKeyUsage)
    usages = [name for attribute, name in _USAGES.items() if usage and getattr(usage, attribute)]
    usages += [_EXTENDED.get(oid, oid.dotted_string) for oid in extended or ()]
    return CertificateFacts(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=names_of(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=f"{serial_of(certificate):x}",
        key=_key(certificate.public_key()),
        usages=tuple(usages),
        fingerprint_sha256=fingerprint(certificate),
    )


def _key(key: PublicKeyTypes) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    return kind_of_key(key)


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """A private key in words; nothing of the key itself.

    Args:
        key: kind and size, ``EC secp256r1``; empty if it is encrypted and there was no passphrase.
        encrypted: whether a passphrase protects it.
    """

    key: str
    encrypted: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """A certificate signing request (CSR, RFC 2986) in words.

    Args:
        subject: distinguished name (RFC 4514); may be empty.
        names: the subject alternative names that it asks for.
        key: kind and size of the public key.
        proven: whether its signature is of that key: who made it has the private key.
    """

    subject: str
    names: tuple[str, ...]
    key: str
    proven: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {**asdict(self), "names": list(self.names)}


@dataclass(frozen=True, slots=True)
class RevocationListFacts:
    """A certificate revocation list (CRL, RFC 5280 section 5) in words.

    Args:
        issuer: distinguished name of the CA.
        revoked: number of certificates in it.
        last_update: when it was made, UTC.
        next_update: when the next one is due, UTC; None if it does not tell.
    """

    issuer: str
    revoked: int
    last_update: datetime
    next_update: datetime | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        due = self.next_update
        return {
            **asdict(self),
            "last_update": self.last_update.isoformat(),
            "next_update": None if due is None else due.isoformat(),
        }


_PRIVATE: Final = 0o600

Facts = CertificateFacts | KeyFacts | RequestFacts | RevocationListFacts

_KINDS: Final = {
    CertificateFacts: "certificate",
    KeyFacts: "private key",
    RequestFacts: "certificate signing request",
    RevocationListFacts: "revocation list",
}


@dataclass(frozen=True, slots=True)
class InspectedItem:
    """One thing in a file.

    Args:
        file: name of the file.
        number: its place in the file, from 1.
        facts: what it is.
    """

    file: str
    number: int
    facts: Facts

    @property
    def kind(self) -> str:
        """``certificate``, ``private key``, ``certificate signing request`` or ``revocation list``."""
        return _KINDS[type(self.facts)]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        return {"file": self.file, "number": self.number, "kind": self.kind, **self.facts.to_json()}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in the files, and how it fits together.

    Args:
        items: everything that was found, in order.
        rows: what was looked at, as in a preflight.
    """

    items: tuple[InspectedItem, ...]
    rows: tuple[PreflightRow, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return all(row.level is not RowLevel.FATAL for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return plain data; keys stay, and later versions may add some."""
        rows = [{**asdict(row), "level": row.level.value} for row in self.rows]
        for row in rows:
            del row["seconds"], row["step"]
        return {"sound": self.sound, "items": [one.to_json() for one in self.items], "rows": rows}


_MAY_BE_WRONG: Final = "the passphrase may be wrong"


@dataclass(frozen=False, slots=True)
class _Found:
    """What was read of one file."""

    content: Content
    certificates: list[x509.Certificate] = field(default_factory=list)
    keys: list[PrivateKeyTypes] = field(default_factory=list, repr=False)
    holds_key: bool = False
    items: list[InspectedItem] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.content.source)

    def add(self, facts: Facts) -> None:
        self.items.append(InspectedItem(self.name, len(self.items) + 1, facts))

    def take(self, block: Block, passphrase: bytes | None) -> None:
        """Read a PEM block; one of another kind than those named here is left out."""
        if block.label in CERTIFICATE_LABELS:
            self.take_certificates(parse_certificates(block.pem, self.name))
        elif block.label in KEY_LABELS:
            self.take_key(lambda secret: _load_key(block.pem, secret), passphrase)
        elif block.label.endswith("CERTIFICATE REQUEST"):
            self.add(_request(x509.load_pem_x509_csr(block.pem)))
        elif block.label == "X509 CRL":
            self.add(_revocation_list(x509.load_pem_x509_crl(block.pem)))
        elif block.label == "PKCS7":
            self.take_certificates(pkcs7.load_pem_pkcs7_certificates(block.pem))

    def take_certificates(self, certificates: Iterable[x509.Certificate]) -> None:
        for certificate in certificates:
            if unread := unreadable_part(certificate):
                what = f"{self.name}: certificate {len(self.certificates) + 1} in it"
                raise MaterialError(f"{what} cannot be read: its {unread[0]}: {error_message(unread[1])}")
            self.certificates.append(certificate)
            self.add(_facts(certificate))

    def take_key(self, load: Callable[[bytes | None], PrivateKeyTypes], passphrase: bytes | None) -> None:
        """Read a key: without a passphrase first, since one that is not needed is an error, too."""
        self.holds_key = True
        encrypted = False
        try:
            key = load(None)
        except TypeError:
            encrypted = True
            if passphrase is None:
                self.add(KeyFacts("", encrypted=True))
                return
            try:
                key = load(passphrase)
            except (ValueError, UnsupportedAlgorithm) as error:
                # One of 256 wrong ones leaves a right padding (RFC 8018, section 6.1.1), and what is no key.
                hint = reencrypt_hint(self.content.source) if is_unknown(error) else _MAY_BE_WRONG
                raise _unreadable(self.content, error, hint=hint) from error
        self.keys.append(key)
        self.add(KeyFacts(_key(key.public_key()), encrypted))


def _load_key(pem: bytes, passphrase: bytes | None) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, UnsupportedAlgorithm):
        if (key := ml_dsa_key(pem, passphrase)) is not None:
            return key
        raise


def read_file(path: str) -> Content:
    """Read a file for `inspect_files`.

    Raises:
        CAError: it cannot be read, is empty, or is larger than such files are.
    """
    return read(Source("", path))


def read_bytes(name: str, data: bytes) -> Content:
    """Take what is not in a file of its own, such as standard input, for `inspect_files`.

    Raises:
        CAError: there is nothing in it, or more than such files have.
    """
    if not data.strip():
        raise MaterialError(f"{name} is empty")
    if len(data) > MAX_SIZE:
        raise MaterialError(f"{name} has more than {MAX_SIZE} bytes; no such file is larger")
    return Content(Source("", name), data, _PRIVATE, os.geteuid())


def inspect_files(
    contents: Sequence[Content],
    *,
    now: datetime,
    anchors_pem: bytes | None = None,
    passphrase: bytes | None = None,
) -> Inspection:
    """Look at certificates, keys, requests and revocation lists, and at how they fit together.

    Args:
        contents: the files, PEM or DER; see `read_file`.
        now: current time, timezone-aware.
        anchors_pem: trust anchors; by default the self-signed CAs among the files.
        passphrase: of encrypted keys and PKCS#12 files.

    Raises:
        MaterialError: a file holds nothing of the kind, or cannot be read; names the file.
    """
    found = [_read(content, passphrase) for content in contents]
    items = tuple(item for one in found for item in one.items)
    with quiet_parsing():
        return Inspection(items, tuple(_rows(found, now, anchors_pem)))


def _read(content: Content, passphrase: bytes | None) -> _Found:
    found = _Found(content)
    with quiet_parsing():
        try:
            blocks = blocks_of(content.data)
            if blocks and is_cut_off(content.data, blocks):
                raise _instead(content, CUT_OFF)
            if any(b"\\n" in block.pem for block in blocks):
                raise _instead(content, ESCAPED)
            for block in blocks:
                found.take(block, passphrase)
            if not blocks:
                _take_der(found, passphrase)
        except MaterialError:
            raise
        except Exception as error:  # untrusted input, and each parser fails with exceptions of its own
            raise _unreadable(content, error, hint=_hint(content, error, passphrase)) from error
    if found.items:
        return found
    raise _instead(content, labelled(blocks[0].label) if blocks else named(content.data))


def _instead(content: Content, foreign: Foreign) -> MaterialError:
    remedy = foreign.remedy and foreign.remedy.replace("{file}", content.source.quoted)
    expected = "expected certificates, keys, certificate signing requests or revocation lists"
    return MaterialError(f"{content.source}: {expected}, found {foreign.name}", hint=remedy)


def _unreadable(content: Content, error: Exception, *, hint: str | None) -> MaterialError:
    return MaterialError(f"{content.source}: cannot be read: {error_message(error)}", hint=hint)


def _hint(content: Content, error: Exception, passphrase: bytes | None) -> str | None:
    """Say what is wrong with the passphrase or the encryption, if that may be it."""
    if b"PRIVATE KEY-----" in content.data and is_unknown(error):
        return reencrypt_hint(content.source)
    if "password" not in str(error).lower() and "pkcs12" not in str(error).lower():
        return None
    return "name a file with its passphrase: --passphrase-file" if passphrase is None else _MAY_BE_WRONG


def _take_der(found: _Found, passphrase: bytes | None) -> None:
    data = found.content.data
    readers: tuple[Callable[[], None], ...] = (
        lambda: found.take_certificates([x509.load_der_x509_certificate(data)]),
        lambda: found.add(_request(x509.load_der_x509_csr(data))),
        lambda: found.add(_revocation_list(x509.load_der_x509_crl(data))),
        lambda: found.take_key(lambda one: serialization.load_der_private_key(data, one), passphrase),
        lambda: found.take_certificates(pkcs7.load_der_pkcs7_certificates(data)),
    )
    for reader in readers:
        try:
            reader()
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        return
    if "PKCS#12" in named(data).name:
        key, certificate, others = pkcs12.load_key_and_certificates(data, passphrase)
        if key is not None:
            found.take_key(lambda _: key, passphrase)
        found.take_certificates([one for one in (certificate, *others) if one is not None])


def _request(request: x509.CertificateSigningRequest) -> RequestFacts:
    names: tuple[str, ...] = ()
    for extension in request.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names = tuple(str(name.value) for name in extension.value)
    return RequestFacts(
        request.subject.rfc4514_string(), names, _key(request.public_key()), request.is_signature_valid
    )


def _revocation_list(crl: x509.CertificateRevocationList) -> RevocationListFacts:
    return RevocationListFacts(
        crl.issuer.rfc4514_string(), len(crl), crl.last_update_utc, crl.next_update_utc
    )


def _rows(found: Sequence[_Found], now: datetime, anchors_pem: bytes | None) -> Iterator[PreflightRow]:
    certificates = list(dict.fromkeys(one for file in found for one in file.certificates))
    for certificate in certificates:
        yield from _own_rows(certificate, now)
    for file in found:
        yield from _key_rows(file, certificates)
        yield from _order_rows(file)
        for item in file.items:
            if isinstance(item.facts, RequestFacts) and not item.facts.proven:
                yield _wrong("request", f"{file.name}: its signature is not of the key in it")
    yield from _chain_rows(certificates, now, anchors_pem)


def _own_rows(certificate: x509.Certificate, now: datetime) -> Iterator[PreflightRow]:
    wrong = out_of_date(certificate, now)
    if wrong is not None:
        yield _wrong("validity", wrong.message, wrong.hint)
    else:
        left = _time_left(certificate.not_valid_after_utc, now)
        yield ok("validity", f"{describe(certificate)} ends in {left}")
    problem = (key_problem if is_ca(certificate) else leaf_key_problem)(certificate)
    if problem is not None:
        yield _wrong("key", f"{describe(certificate)} {problem}")
    problem = signature_problem(certificate)
    if problem is not None and is_ca(certificate) and is_self_signed(certificate):
        text = f"{describe(certificate)} {problem}; TLS does not look at the signature of a trust anchor"
        yield warning("signature", text, "some strict libraries do")
    elif problem is not None:
        yield _wrong("signature", f"{describe(certificate)} {problem}")


def _key_rows(file: _Found, certificates: Sequence[x509.Certificate]) -> Iterator[PreflightRow]:
    if file.holds_key:
        try:
            file.content.must_be_private()
        except CAError as error:
            yield warning("key file", error.message, error.hint)
    if not certificates:
        return
    for key in file.keys:
        wanted = public_key_bytes(key.public_key())
        fitting = [one for one in certificates if _public_key(one) == wanted]
        if fitting:
            yield ok("key", f"the key of {file.name} fits {describe(fitting[0])}")
        else:
            hint = "name the certificate that was made for this key"
            yield _wrong("key", f"the key of {file.name} fits none of the certificates", hint)
    if file.holds_key and not file.keys:
        yield skipped("key", f"the key of {file.name} is encrypted: --passphrase-file names its passphrase")


def _public_key(certificate: x509.Certificate) -> bytes | None:
    try:
        return public_key_bytes(certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return None


def _order_rows(file: _Found) -> Iterator[PreflightRow]:
    """Say what TLS servers and clients would stumble over in a file with a leaf and its chain."""
    leaves = [one for one in file.certificates if not is_ca(one)]
    if len(leaves) != 1:
        return
    (leaf,) = leaves
    if file.certificates[0] != leaf:
        yield warning("order", f"{file.name}: the certificate of the leaf is not the first one")
    rest = [one for one in file.certificates if one != leaf]
    for remark in chain_remarks(leaf, rest):
        text = remark.removeprefix("the chain that the provider returned ").partition(",")[0]
        yield warning("order", f"{file.name}: the chain {text}")


def _chain_rows(
    certificates: Sequence[x509.Certificate], now: datetime, anchors_pem: bytes | None
) -> Iterator[PreflightRow]:
    leaves = [one for one in certificates if not is_ca(one)]
    for leaf in leaves:
        if not _uses(leaf):
            extended = extension_of(leaf, x509.ExtendedKeyUsage) or ()
            shown = ", ".join(_EXTENDED.get(oid, oid.dotted_string) for oid in extended)
            yield skipped("use", f"{describe(leaf)} is for neither servers nor guests, but for: {shown}")
    leaves = [one for one in leaves if _uses(one)]
    if not leaves:
        return
    authorities = [one for one in certificates if is_ca(one)]
    roots = [one for one in authorities if is_self_signed(one)]
    if anchors_pem is None and not roots:
        yield skipped("chain", "no trust anchor among these files: --trust names a file with one")
        return
    anchors = to_pem(roots) if anchors_pem is None else anchors_pem
    try:
        trust = verify_trust(TrustBundle(anchors, to_pem(authorities)), now)
    except MaterialError as error:
        yield _wrong("trust", error.message, error.hint)
        return
    for leaf in leaves:
        for profile in _uses(leaf):
            yield from _use_rows(leaf, profile, trust, now)


def _uses(leaf: x509.Certificate) -> list[Profile]:
    """List the ends that a leaf means to be for; whether it may is for the checks to say."""
    usage = extension_of(leaf, x509.ExtendedKeyUsage)
    if usage is None or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usage:
        return list(USAGE)
    return [one for one in USAGE if USAGE[one] in usage]


def _use_rows(
    leaf: x509.Certificate, profile: Profile, trust: Trust, now: datetime
) -> Iterator[PreflightRow]:
    about = f"{profile} use"
    alternative = extension_of(leaf, x509.SubjectAlternativeName)
    found = alternative.get_values_for_type(x509.DNSName) if alternative is not None else ()
    names = tuple(name for name in found if "*" not in name)  # a wildcard is nobody's identity
    if profile is Profile.SERVER and not names:
        what = f"no DNS name without a wildcard, only {', '.join(found)}," if found else "no DNS name"
        yield _wrong(about, f"{describe(leaf)} has {what} among its subject alternative names")
        return
    expected = Expectation(profile, names, leaf.public_key(), now=now, deadline=now, ttl=None, exact=False)
    try:
        verified = verify_certificate(to_pem([leaf]), to_pem(trust.intermediates), trust, expected)
    except MaterialError as error:
        yield _wrong(about, error.message, error.hint)
        return
    chain = verified.chain
    yield ok(about, f"{describe(leaf)}, by the trust anchor {describe(chain.anchor)}")
    for text in (*verified.warnings, *verified.remarks):
        yield warning(about, text)


def _wrong(about: str, message: str, hint: str | None = None) -> PreflightRow:
    return PreflightRow(about, RowLevel.FATAL, message, hint)


def _time_left(end: datetime, now: datetime) -> str:
    left = end - now
    hours, minutes = left.seconds // 3600, left.seconds % 3600 // 60
    if left.days >= 2:
        return counted(left.days, "day")
    return f"{left.days * 24 + hours} h {minutes} min"
