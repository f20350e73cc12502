"""From a certificate up to what server and guest trust."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from firebuild_pki.chain import Links, describe, is_self_signed, order_issuers, signature_problem
from firebuild_pki.errors import CAError
from firebuild_pki.providers.file.certificates import (
    Found,
    certificates_of,
    load_certificates,
    must_be_ca,
    must_be_valid,
)
from firebuild_pki.providers.file.reading import Source
from firebuild_pki.providers.file.settings import FileSettings


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


def find_path(start: Found, pool: Pool, now: datetime, *, beside: Sequence[Found] = ()) -> Path:
    """Lead a certificate to an anchor.

    An expired anchor can vouch for nothing, so it is left out while there are others.

    Args:
        start: the certificate.
        pool: what the settings name.
        now: the current time.
        beside: more certificates that may be between the two; never trusted.

    Raises:
        CAError: an issuer is missing, is no CA, or is not valid now.
    """
    anchors = [one for one in pool.trusted if one.valid_at(now)]
    if not anchors:
        must_be_valid(pool.trusted[0], now)
    itself = next((one for one in anchors if one.certificate == start.certificate), None)
    if itself is not None:
        return _path(pool, (), anchors, itself)
    known = [*pool.known, *beside]
    route = _route(start, [one for one in known if one.valid_at(now)], anchors)
    if route is None:
        # the way there may lead over something that expired: say so rather than "missing"
        for one in _route(start, known, pool.trusted) or ():
            must_be_valid(one, now)
        raise _broken(start, known, anchors)
    for one in route:
        must_be_ca(one)
    return _path(pool, route[:-1], anchors, route[-1])


def _route(start: Found, known: Sequence[Found], anchors: Sequence[Found]) -> tuple[Found, ...] | None:
    """Find the issuers of a certificate up to and with an anchor; cross-signed CAs have several."""
    for anchor in _latest_first(anchors):
        if _issued(start, anchor):
            return (anchor,)
    rest = [one for one in known if one.certificate != start.certificate]
    for issuer in _latest_first(rest):
        if not is_self_signed(issuer.certificate) and _issued(start, issuer):
            above = _route(issuer, rest, anchors)
            if above is not None:
                return (issuer, *above)
    return None


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
            "have it issued anew; a CA can also be named in anchors, where its signature does not count",
        )
    wanted = last.issuer.rfc4514_string() or "no name"
    trusted = " and ".join(f"{one.name} in {one.source}" for one in anchors)
    return start.source.wrong(
        f'the chain does not reach an anchor: {describe(last)} was issued by "{wanted}", which is neither '
        f"in ca_cert nor in chain; the anchors are {trusted}",
        "add the certificate of that issuer to chain, or name the highest CA that you do have in anchors",
    )
