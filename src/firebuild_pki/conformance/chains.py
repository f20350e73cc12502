"""Checks of what stands above the certificate: its chain and the trust bundle."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography import x509

from firebuild_pki.chain import build_chain, describe, is_self_signed, order_issuers
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.certificates import each_profile
from firebuild_pki.conformance.contract import Breach, contract
from firebuild_pki.conformance.features import Feature
from firebuild_pki.provider import Profile
from firebuild_pki.verify import verify_trust


class ChainChecks(Checks):
    """The chain, as the provider returns it, and the anchors it leads to."""

    @each_profile
    @contract(see="SignedCertificate", needs=(Feature.SIGN,))
    def test_the_chain_holds_issuers_only(self, ca_bench: Bench, profile: Profile) -> None:
        """The chain holds the issuers alone: not the leaf, no root, nothing twice."""
        with ca_bench.direct() as provider:
            answer = provider.signed(profile)
        _must_be_issuers(answer.leaf, answer.others)

    @each_profile
    @contract(see="SignedCertificate", needs=(Feature.SIGN,))
    def test_the_chain_goes_from_the_bottom_up(self, ca_bench: Bench, profile: Profile) -> None:
        """The chain goes from the bottom up: each certificate is signed by the next."""
        with ca_bench.direct() as provider:
            answer = provider.signed(profile)
        issuers = order_issuers(answer.leaf, answer.others)
        found = [one for one in answer.others if one in issuers]
        if list(dict.fromkeys(found)) != issuers:
            raise Breach("the order " + ", ".join(map(describe, found)))

    @each_profile
    @contract(see="TrustBundle")
    def test_the_chain_is_complete(self, ca_bench: Bench, profile: Profile) -> None:
        """The chain leads from the leaf to a trust anchor: no link is missing, no stranger in it."""
        with ca_bench.direct() as provider:
            answer = provider.answer(profile)
            trust = verify_trust(provider.trust_bundle(), ca_bench.clock())
        chain = build_chain(answer.leaf, answer.others, trust.anchors)
        for one in answer.others:
            if one not in {*chain.issuers, answer.leaf} and not is_self_signed(one):
                raise Breach(f"the stranger {describe(one)}")

    @contract(see="TrustBundle")
    def test_the_trust_bundle_holds_valid_cas(self, ca_bench: Bench) -> None:
        """The trust bundle holds CAs that are valid now, at least one as an anchor."""
        with ca_bench.direct() as provider:
            verify_trust(provider.trust_bundle(), ca_bench.clock())

    @contract(see="TrustBundle")
    def test_the_trust_bundle_stays_the_same(self, ca_bench: Bench) -> None:
        """The trust bundle stays the same while the provider is open."""
        with ca_bench.direct() as provider:
            before = provider.trust_bundle()
            provider.answer(Profile.SERVER)
            after = provider.trust_bundle()
        if before != after:
            raise Breach("another trust bundle after a certificate was issued")


def _must_be_issuers(leaf: x509.Certificate, chain: Sequence[x509.Certificate]) -> None:
    if len(set(chain)) < len(chain):
        raise Breach("a certificate twice")
    if leaf in chain:
        raise Breach("the leaf")
    for one in chain:
        if is_self_signed(one):
            raise Breach(f"the root {describe(one)}")
