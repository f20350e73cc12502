"""Putting the certificates that a provider returned into the order that TLS wants."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

from firebuild_pki.errors import MaterialError
from firebuild_pki.x509 import fingerprint, to_pem


@dataclass(frozen=True, slots=True)
class Chain:
    """A leaf, its issuers from the bottom up without the root, and the anchor they lead to."""

    leaf: x509.Certificate
    issuers: tuple[x509.Certificate, ...]
    anchor: x509.Certificate

    @property
    def issuer(self) -> x509.Certificate:
        """The certificate that signed the leaf."""
        return self.issuers[0] if self.issuers else self.anchor

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """What a TLS server or client sends: leaf first, no root (RFC 8446 section 4.4.2)."""
        return (self.leaf, *self.issuers)


def parse_certificates(pem: bytes | str, what: str) -> list[x509.Certificate]:
    """Read PEM certificates; a missing newline between or after them is tolerated.

    Args:
        pem: any number of certificates, at least one.
        what: how messages call it.

    Raises:
        MaterialError: nothing in it is a certificate, or one is broken.
    """
    if not isinstance(pem, bytes | str):
        raise MaterialError(f"expected PEM text as {what}, found {type(pem).__name__}")
    data = pem.encode() if isinstance(pem, str) else pem
    data = data.replace(b"----------", b"-----\n-----")
    try:
        with warnings.catch_warnings():  # a serial number of zero, which old tools gave to their CAs
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        message = f"expected PEM certificates as {what}, but they cannot be read: {reason}"
        raise MaterialError(message) from error


def build_chain(
    leaf: x509.Certificate,
    pool: Iterable[x509.Certificate],
    anchors: Sequence[x509.Certificate],
) -> Chain:
    """Walk from the leaf to an anchor, by signature; order and repetition do not matter.

    Args:
        leaf: where to begin.
        pool: candidates for the issuers; roots and strangers among them are left out.
        anchors: where the walk may end.

    Raises:
        MaterialError: a link is missing; the message names it.
    """
    paths = _paths_up(leaf, pool)
    for path in paths:
        anchor = _issuer_among(anchors, path[-1])
        if anchor is not None:
            return Chain(leaf, path[1:], anchor)
    raise _missing_link(paths[-1][-1], anchors)


def order_issuers(leaf: x509.Certificate, pool: Iterable[x509.Certificate]) -> list[x509.Certificate]:
    """Pick all issuers of a leaf out of a heap, the nearest first, without roots; by signature."""
    return [path[-1] for path in _paths_up(leaf, pool)[1:]]


def _paths_up(leaf: x509.Certificate, pool: Iterable[x509.Certificate]) -> list[tuple[x509.Certificate, ...]]:
    # a cross-signed issuer has several ways up, so all are followed; the shortest come first
    unreached = [one for one in dict.fromkeys(pool) if one != leaf and not is_self_signed(one)]
    paths: list[tuple[x509.Certificate, ...]] = [(leaf,)]
    for path in paths:
        issuers = [one for one in unreached if _signed_by(path[-1], one)]
        unreached = [one for one in unreached if one not in issuers]
        paths += [(*path, issuer) for issuer in issuers]
    return paths


def order_chain(leaf_pem: bytes, others_pem: bytes) -> bytes:
    """Make a chain out of the certificates that a backend returned, for `SignedCertificate`.

    Args:
        leaf_pem: the certificate of the server or guest.
        others_pem: any certificates in any order, also none.

    Returns:
        The issuers of the leaf from the bottom up, as PEM; no leaf, no root, nothing twice, and
        nothing that is not above the leaf.

    Raises:
        MaterialError: something cannot be read.
    """
    (leaf, *more) = parse_certificates(leaf_pem, "certificate")
    others = parse_certificates(others_pem, "chain") if others_pem.strip() else []
    return to_pem(order_issuers(leaf, [*more, *others]))


def chain_remarks(leaf: x509.Certificate, returned: Sequence[x509.Certificate]) -> list[str]:
    """Say what had to be repaired in a chain as a provider returned it."""
    remarks = []
    rest = list(dict.fromkeys(returned))
    if len(rest) < len(returned):
        remarks.append("holds a certificate twice, which was left out")
    if leaf in rest:
        remarks.append("holds the leaf, which was left out")
    if any(map(is_self_signed, rest)):
        remarks.append("holds a root, which was left out")
    issuers = order_issuers(leaf, rest)
    if [one for one in rest if one in issuers] != issuers:
        remarks.append("is out of order, and was sorted")
    return [f"the chain that the provider returned {remark}" for remark in remarks]


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Tell a root: it carries its own signature."""
    return _signed_by(certificate, certificate)


def describe(certificate: x509.Certificate) -> str:
    """Name a certificate in a message: subject and the start of its fingerprint."""
    subject = certificate.subject.rfc4514_string() or "no subject"
    return f'"{subject}" (sha256 {fingerprint(certificate)[:16]}…)'


def _issuer_among(
    candidates: Iterable[x509.Certificate], certificate: x509.Certificate
) -> x509.Certificate | None:
    return next((one for one in candidates if _signed_by(certificate, one)), None)


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _missing_link(current: x509.Certificate, anchors: Sequence[x509.Certificate]) -> MaterialError:
    wanted = current.issuer.rfc4514_string() or "no name"
    known = ", ".join(describe(anchor) for anchor in anchors)
    return MaterialError(
        f'the chain has a missing link: {describe(current)} was issued by "{wanted}", '
        "which is neither in the chain nor among the trust anchors",
        hint=f"the trust anchors are {known}; add the missing CA certificate to the chain",
    )
