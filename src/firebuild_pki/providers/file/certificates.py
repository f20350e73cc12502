"""Certificates in files, each with the file that it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import PublicKeyAlgorithmOID

from firebuild_pki.chain import describe, in_words, read_certificate
from firebuild_pki.errors import CAError
from firebuild_pki.leaf_checks import is_ca
from firebuild_pki.providers.file.keys import LoadedKey
from firebuild_pki.providers.file.pem import CERTIFICATE_LABELS, Block, blocks_in
from firebuild_pki.providers.file.reading import Source, read
from firebuild_pki.verify import public_key_bytes


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
        hint = "version 1 knows no CAs: issue it anew as version 3, with the same key and subject"
        raise source.wrong(f"{found.name} is an X.509 certificate of version 1", hint)
    if not is_ca(certificate):
        hint = "name the CA's certificate, not one that it issued; a CA has basicConstraints=critical,CA:TRUE"
        raise source.wrong(f"{found.name} is not a CA", hint)
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        hint = "issue it anew with keyUsage=critical,keyCertSign,cRLSign"
        raise source.wrong(f"the key usage of {found.name} lacks keyCertSign", hint)


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
        raise _misfit(key.source, among, [one for one in elsewhere if one.fits(public)])
    fitting.sort(key=lambda one: (one.valid_at(now), one.certificate.not_valid_after_utc), reverse=True)
    best = fitting[0]
    if best.certificate.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS:
        hint = "make a key with: openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072"
        raise best.source.wrong(f"the key of {best.name} is for RSA-PSS only, which gRPC cannot use", hint)
    return fitting


def _misfit(key: Source, among: Sequence[Found], elsewhere: Sequence[Found]) -> CAError:
    names = " and ".join(one.name for one in among)
    source = among[0].source
    hint = (
        "these two have to print the same: "
        f"openssl pkey -in {key.quoted} -pubout; openssl x509 -in {source.quoted} -noout -pubkey"
    )
    if elsewhere:
        hint = f"it fits {elsewhere[0].name} in {elsewhere[0].source}"
    return key.wrong(f"the key does not fit {names} in {source}", hint)


def _parsed(source: Source, number: int, block: Block) -> Found:
    try:
        certificate = read_certificate(block.pem)
        # parsed on first use; what is broken has to show here
        _ = certificate.subject, certificate.issuer, certificate.extensions, certificate.public_key()
    except Exception as error:
        raise source.wrong(f"certificate {number} in it cannot be read: {in_words(error)}") from error
    return Found(certificate, source)
