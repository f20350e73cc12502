"""What the peers have to trust: the CA certificates of the mount, or a file of the operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from firebuild_pki.chain import is_self_signed, order_chain, parse_certificates
from firebuild_pki.errors import MaterialError
from firebuild_pki.provider import TrustBundle
from firebuild_pki.x509 import to_pem


@dataclass(frozen=True, slots=True)
class IssuerChain:
    """A certificate of the mount that signs leaves, and what is known above it.

    Args:
        issuers: from the one that signs leaves upwards, without root.
        root: the root, if the mount knows it.
    """

    issuers: tuple[x509.Certificate, ...]
    root: x509.Certificate | None

    @property
    def anchor(self) -> x509.Certificate:
        """The topmost certificate that is known."""
        return self.root or self.issuers[-1]

    @property
    def below(self) -> tuple[x509.Certificate, ...]:
        """The certificates below the anchor."""
        return self.issuers if self.root else self.issuers[:-1]

    @property
    def certificates(self) -> tuple[x509.Certificate, ...]:
        """All of them, from the bottom up."""
        return (*self.issuers, *([self.root] if self.root else []))


def issuer_chain(data: Mapping[str, Any]) -> IssuerChain:
    """Read the answer of ``<mount>/issuer/<ref>/json``.

    Raises:
        MaterialError: it holds no readable certificate.
    """
    pem = pem_of(data, "certificate", "ca_chain")
    if not pem:
        raise MaterialError("the mount has no CA certificate", hint="make or import a CA in the mount")
    pool = parse_certificates(pem, "CA certificates of the mount")
    issuer = pool[0]
    if is_self_signed(issuer):
        return IssuerChain((), issuer)
    above = order_chain(to_pem([issuer]), to_pem(pool[1:]))
    issuers = (issuer, *(parse_certificates(above, "chain") if above else ()))
    roots = [one for one in pool if is_self_signed(one)]
    return IssuerChain(issuers, next((root for root in roots if _signed(issuers[-1], root)), None))


def bundle(chains: Sequence[IssuerChain], override: bytes | None) -> TrustBundle:
    """Make the trust bundle of all issuers that sign leaves.

    Args:
        chains: one for each issuer, the server's first.
        override: PEM of the anchors that the operator named.
    """
    if override is None:
        anchors = dict.fromkeys(chain.anchor for chain in chains)
        below = dict.fromkeys(one for chain in chains for one in chain.below)
        return TrustBundle(to_pem(list(anchors)), to_pem(list(below)))
    chosen = parse_certificates(override, "trust anchors in the file of the setting trust")
    known = dict.fromkeys(one for chain in chains for one in chain.issuers)
    return TrustBundle(to_pem(chosen), to_pem([one for one in known if one not in chosen]))


def pem_of(data: Mapping[str, Any], *keys: str) -> bytes:
    """Join the certificates in an answer; each key holds a PEM text or a list of them, or is absent."""
    texts: list[str] = []
    for key in keys:
        value = data.get(key)
        texts += value if isinstance(value, list) else [value] if value else []
    return "\n".join(str(text).strip() for text in texts).encode()


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:
        return False
    return True
