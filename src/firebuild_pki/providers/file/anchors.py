"""From a CA certificate up to what server and guest trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from firebuild_pki.chain import build_chain, describe, order_issuers
from firebuild_pki.errors import CAError, MaterialError
from firebuild_pki.providers.file.certificates import (
    Found,
    certificates_of,
    has_forgotten_signature,
    is_root,
    load_certificates,
    must_be_ca,
    must_be_valid,
)
from firebuild_pki.providers.file.reading import Source
from firebuild_pki.providers.file.settings import FileSettings


@dataclass(frozen=True, slots=True)
class Pool:
    """All CA certificates that the settings name, besides the one in question.

    Args:
        known: those in ca_cert and chain, CAs or not.
        anchors: those in anchors.
    """

    known: tuple[Found, ...]
    anchors: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class Path:
    """How a CA certificate is anchored.

    Args:
        issuers: what peers need between leaf and anchor, the CA first; empty if it is an anchor.
        anchors: what they trust.
        reached: that of the anchors to which the CA leads.
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
    return Pool(tuple(known), tuple(anchors))


def choose_anchors(pool: Pool, otherwise: Sequence[Found], now: datetime) -> tuple[Found, ...]:
    """List what may be trusted: the anchors of the settings, else the roots among all, else the rest.

    An expired anchor can vouch for nothing, so it is left out while there are others.

    Args:
        pool: the certificates known.
        otherwise: the anchors if neither are there.
        now: the current time.

    Raises:
        CAError: none of them is valid now.
    """
    listed = _listed(pool, otherwise)
    valid = tuple(one for one in listed if one.valid_at(now))
    if not valid:
        must_be_valid(listed[0], now)
    return valid


def find_path(ca: Found, pool: Pool, now: datetime) -> Path:
    """Lead a CA certificate to an anchor.

    Raises:
        CAError: an issuer is missing, is no CA, or is not valid now.
    """
    anchors = choose_anchors(pool, [ca], now)
    itself = next((one for one in anchors if one.certificate == ca.certificate), None)
    if itself is not None:
        return Path((), _trusted(pool, anchors, itself), itself)
    usable = [one for one in pool.known if one.valid_at(now)]
    try:
        chain = build_chain(ca.certificate, certificates_of(usable), certificates_of(anchors))
    except MaterialError as error:
        _must_not_be_expired(ca, pool, now)
        raise _broken(ca, pool, anchors) from error
    above = [_place(one, usable) for one in chain.issuers]
    reached = _place(chain.anchor, anchors)
    for one in (*above, reached):
        must_be_ca(one)
    return Path((ca, *above), _trusted(pool, anchors, reached), reached)


def _listed(pool: Pool, otherwise: Sequence[Found]) -> Sequence[Found]:
    return pool.anchors or [one for one in pool.known if is_root(one.certificate)] or otherwise


def _trusted(pool: Pool, anchors: tuple[Found, ...], reached: Found) -> tuple[Found, ...]:
    # a stray root in a bundle is not trusted just for being there
    return anchors if pool.anchors else (reached,)


def _place(certificate: x509.Certificate, among: Sequence[Found]) -> Found:
    return next(one for one in among if one.certificate == certificate)


def _must_not_be_expired(ca: Found, pool: Pool, now: datetime) -> None:
    every = _listed(pool, [ca])
    try:
        chain = build_chain(ca.certificate, certificates_of(pool.known), certificates_of(every))
    except MaterialError:
        return
    for one in (*chain.issuers, chain.anchor):
        must_be_valid(_place(one, [*pool.known, *every]), now)


def _broken(ca: Found, pool: Pool, anchors: Sequence[Found]) -> CAError:
    issuers = order_issuers(ca.certificate, certificates_of(pool.known))
    last = issuers[-1] if issuers else ca.certificate
    if has_forgotten_signature(last):
        return ca.source.wrong(
            f"{describe(last)} is signed with a hash that is not accepted any more (SHA-1 or MD5)",
            "have it issued anew; or name its file in anchors, which are trusted whatever their signature",
        )
    wanted = last.issuer.rfc4514_string() or "no name"
    known = " and ".join(f"{one.name} in {one.source}" for one in anchors)
    return ca.source.wrong(
        f'the chain does not reach an anchor: {describe(last)} was issued by "{wanted}", which is neither '
        f"in ca_cert nor in chain; the anchors are {known}",
        "add the certificate of that issuer to chain, or name the highest CA that you do have in anchors",
    )
