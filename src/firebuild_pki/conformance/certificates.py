"""Checks of the certificate itself, as the provider returns it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import pytest
from cryptography import x509

from firebuild_pki.chain import build_chain, describe, is_self_signed, order_issuers
from firebuild_pki.conformance.base import Checks
from firebuild_pki.conformance.bench import Bench
from firebuild_pki.conformance.contract import Feature, Violation, contract
from firebuild_pki.leaf_checks import MIN_SERIAL_BITS, is_ca
from firebuild_pki.provider import Profile
from firebuild_pki.verify import TOLERANCE, verify_trust
from firebuild_pki.x509 import USAGE

ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)

each_profile = pytest.mark.parametrize("profile", list(Profile), ids=str)


class CertificateChecks(Checks):
    """Key, names, usage, validity: the leaf."""

    @each_profile
    @contract(see="SignedCertificate")
    def test_the_answer_is_a_certificate(self, ca_bench: Bench, profile: Profile) -> None:
        """A provider returns one certificate and its chain, in PEM."""
        with ca_bench.direct() as provider:
            answer = provider.answer(profile)
        if answer.flaw:
            raise Violation(answer.flaw)

    @each_profile
    @contract(see="SignRequest")
    def test_the_certificate_is_for_the_right_key(self, ca_bench: Bench, profile: Profile) -> None:
        """The certificate is for the key of the request (ready pairs: for their key)."""
        with ca_bench.direct() as provider:
            answer = provider.answer(profile)
        if not answer.key_fits:
            raise Violation("a certificate for another key")

    @each_profile
    @contract(see="SignRequest")
    def test_the_certificate_has_the_right_names(self, ca_bench: Bench, profile: Profile) -> None:
        """The subject alternative names are exactly those of the request (ready pairs: have its name)."""
        with ca_bench.direct() as provider:
            answer = provider.answer(profile)
        _must_name(answer.leaf, answer.names, answer.exact)

    @contract(see="SignRequest", needs=(Feature.SIGN, Feature.SEVERAL_NAMES))
    def test_several_names_are_certified(self, ca_bench: Bench) -> None:
        """A certificate can have several names."""
        suffix = ca_bench.settings.name_suffix
        names = (f"one.{suffix}", f"two.{suffix}")
        with ca_bench.direct() as provider:
            answer = provider.signed(Profile.SERVER, names=names)
        _must_name(answer.leaf, names, True)

    @each_profile
    @contract(see="SignRequest")
    def test_the_certificate_is_for_one_end_only(self, ca_bench: Bench, profile: Profile) -> None:
        """The extended key usage is serverAuth alone for servers, clientAuth alone for guests."""
        with ca_bench.direct() as provider:
            leaf = provider.answer(profile).leaf
        usage = _extension(leaf, x509.ExtendedKeyUsage)
        found = set(usage) if usage else set()
        if found != {USAGE[profile]}:
            shown = sorted(oid._name for oid in found)
            raise Violation(
                f"the extended key usage {', '.join(shown) or 'none'} in the {profile} certificate"
            )

    @each_profile
    @contract(see="SignedCertificate")
    def test_the_certificate_is_an_end_entitys(self, ca_bench: Bench, profile: Profile) -> None:
        """The certificate is not a CA's; its key usage is critical and without certificate signing."""
        with ca_bench.direct() as provider:
            leaf = provider.answer(profile).leaf
        if is_ca(leaf):
            raise Violation("basic constraints of a CA")
        usage = _extension(leaf, x509.KeyUsage)
        if usage is None:
            raise Violation("no key usage extension")
        if not usage.digital_signature:
            raise Violation("a key usage without digitalSignature, which TLS 1.3 needs")
        if usage.key_cert_sign:
            raise Violation("a key usage with keyCertSign")

    @contract(see="SignedCertificate", needs=(Feature.SIGN,))
    def test_the_serial_number_is_unique(self, ca_bench: Bench) -> None:
        """Each certificate has a serial number of its own, of at least 64 random bits."""
        with ca_bench.direct() as provider:
            serials = [provider.signed(Profile.GUEST).leaf.serial_number for _ in range(3)]
        if len(set(serials)) < len(serials):
            raise Violation("the same serial number again")
        if max(serial.bit_length() for serial in serials) < MIN_SERIAL_BITS:
            raise Violation(f"serial numbers such as {serials[0]:x}")

    @each_profile
    @contract(see="SignRequest")
    def test_the_certificate_is_valid_now(self, ca_bench: Bench, profile: Profile) -> None:
        """The certificate is valid already, not only from a later time on."""
        with ca_bench.direct() as provider:
            leaf = provider.answer(profile).leaf
        now = ca_bench.clock()
        if leaf.not_valid_before_utc > now:
            raise Violation(f"a start of the validity at {leaf.not_valid_before_utc}, now is {now}")
        if leaf.not_valid_after_utc < now:
            raise Violation(f"an end of the validity at {leaf.not_valid_after_utc}, now is {now}")

    @pytest.mark.parametrize("minutes", [20, 120])
    @contract(see="SignRequest", needs=(Feature.SIGN, Feature.LIFETIME))
    def test_the_certificate_lives_as_long_as_was_asked(self, ca_bench: Bench, minutes: int) -> None:
        """The certificate has the requested lifetime, give or take a minute."""
        with ca_bench.direct() as provider:
            answer = provider.signed(Profile.SERVER, ttl=timedelta(minutes=minutes))
        end = answer.leaf.not_valid_after_utc
        if answer.until is None or abs(end - answer.until) > TOLERANCE:
            raise Violation(f"an end of the validity at {end}, asked was {answer.until}")


def _must_name(leaf: x509.Certificate, wanted: tuple[str, ...], exact: bool) -> None:
    names = _extension(leaf, x509.SubjectAlternativeName)
    found = set(names) if names else set()
    expected = {x509.DNSName(name) for name in wanted}
    if not (found == expected if exact else expected <= found):
        shown = ", ".join(sorted(str(name.value) for name in found)) or "none"
        raise Violation(f"the names {shown}; wanted: {', '.join(wanted)}")


def _extension(leaf: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    try:
        return leaf.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


class ChainChecks(Checks):
    """The chain, as the provider returns it, and the anchors it leads to."""

    @each_profile
    @contract(see="SignedCertificate", needs=(Feature.SIGN,))
    def test_the_chain_holds_issuers_only(self, ca_bench: Bench, profile: Profile) -> None:
        """The chain has only issuers: not the leaf, no root, no duplicates."""
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
            raise Violation("the order " + ", ".join(map(describe, found)))

    @each_profile
    @contract(see="TrustBundle")
    def test_the_chain_is_complete(self, ca_bench: Bench, profile: Profile) -> None:
        """The chain leads from the leaf to a trust anchor without missing links or unrelated certificates."""
        with ca_bench.direct() as provider:
            answer = provider.answer(profile)
            trust = verify_trust(provider.trust_bundle(), ca_bench.clock())
        chain = build_chain(answer.leaf, answer.others, trust.anchors)
        for one in answer.others:
            if one not in {*chain.issuers, answer.leaf} and not is_self_signed(one):
                raise Violation(f"the unrelated certificate {describe(one)}")

    @contract(see="TrustBundle")
    def test_the_trust_bundle_holds_valid_cas(self, ca_bench: Bench) -> None:
        """The trust bundle has CAs that are valid now, at least one of them an anchor."""
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
            raise Violation("another trust bundle after a certificate was issued")


def _must_be_issuers(leaf: x509.Certificate, chain: Sequence[x509.Certificate]) -> None:
    if len(set(chain)) < len(chain):
        raise Violation("a certificate twice")
    if leaf in chain:
        raise Violation("the leaf")
    for one in chain:
        if is_self_signed(one):
            raise Violation(f"the root {describe(one)}")
