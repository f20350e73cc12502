"""What a provider returned, read but not repaired."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from firebuild_pki.chain import parse_certificates
from firebuild_pki.conformance.contract import Breach
from firebuild_pki.keys import PrivateKey
from firebuild_pki.provider import ReadyPair, SignedCertificate, SignRequest
from firebuild_pki.verify import public_key_bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """A certificate, the others that came with it, and what was asked.

    Args:
        leaf: the one with the wanted key; if there is none, the first.
        others: the rest, in the provider's order.
        key_fits: whether the leaf is for the wanted key.
        flaw: what is wrong with the form of the answer.
        names: the names wanted.
        exact: whether other names are forbidden.
        until: the end of the validity that was asked for, None for ready pairs.
    """

    leaf: x509.Certificate
    others: tuple[x509.Certificate, ...]
    key_fits: bool
    flaw: str | None
    names: tuple[str, ...]
    exact: bool
    until: datetime | None = None


def from_signing(answer: object, request: SignRequest, key: PrivateKey, asked_at: datetime) -> Answer:
    """Read the answer to a request.

    Raises:
        Breach: it is something else than a `SignedCertificate`.
        MaterialError: it cannot be read.
    """
    if not isinstance(answer, SignedCertificate):
        raise Breach(f"{type(answer).__name__} instead of a SignedCertificate")
    leaves = parse_certificates(answer.certificate_pem, "certificate")
    # no bytes are no reason to give up: one check is about that, the others look at the certificates
    chain = parse_certificates(answer.chain_pem, "chain") if answer.chain_pem else []
    until = asked_at + request.ttl
    flaw = _flaw(answer, len(leaves))
    return Answer(*_sorted([*leaves, *chain], key), flaw, request.dns_names, exact=True, until=until)


def from_pair(answer: object) -> Answer:
    """Read a ready pair.

    Raises:
        Breach: it is something else than a `ReadyPair`, or its key cannot be read.
        MaterialError: its certificates cannot be read.
    """
    if not isinstance(answer, ReadyPair):
        raise Breach(f"{type(answer).__name__} instead of a ReadyPair")
    found = parse_certificates(answer.certificate_chain_pem, "certificate chain")
    try:
        key = serialization.load_pem_private_key(answer.private_key_pem, None)
    except (ValueError, TypeError):
        raise Breach("a private key that is not unencrypted PEM") from None
    if not isinstance(key, PrivateKey):
        raise Breach("a private key that is neither EC nor RSA")
    return Answer(*_sorted(found, key), None, (answer.name,), exact=False)


def _flaw(answer: SignedCertificate, leaves: int) -> str | None:
    if leaves != 1:
        return f"{leaves} certificates in certificate_pem; issuers belong in chain_pem"
    for name in ("certificate_pem", "chain_pem"):
        kind = type(getattr(answer, name))
        if kind is not bytes:
            return f"{name} of type {kind.__name__} instead of bytes"
    return None


def _sorted(
    found: list[x509.Certificate], key: PrivateKey
) -> tuple[x509.Certificate, tuple[x509.Certificate, ...], bool]:
    wanted = public_key_bytes(key.public_key())
    fitting = [one for one in found if public_key_bytes(one.public_key()) == wanted]
    leaf = (fitting or found)[0]
    position = found.index(leaf)
    return leaf, (*found[:position], *found[position + 1 :]), bool(fitting)
