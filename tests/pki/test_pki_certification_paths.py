"""What is proven of an authority's CAs once is not asked again, and no verdict changes for it."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from firebuild_pki import MaterialError, Profile, TrustBundle
from firebuild_pki import verify as verify_module
from firebuild_pki.keys import generate_key
from firebuild_pki.provider import utc_now
from firebuild_pki.verify import (
    CertificationPath,
    Expectation,
    Trust,
    Verified,
    verify_certificate,
    verify_trust,
)
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, pem

NOW = utc_now().replace(microsecond=0)
LONG = (NOW - timedelta(days=1), NOW + timedelta(days=30))
SHORT = (NOW - timedelta(days=1), NOW + timedelta(hours=2))
DNS, URI, MAIL = x509.DNSName, x509.UniformResourceIdentifier, x509.RFC822Name
NAME = "b.firebuild.internal"
KEY = generate_key()
ANOTHER_KEY = x509.AuthorityKeyIdentifier(b"another key", None, None)
DOMAINS = ("a.b", "x.a.b", "A.b", "xa.b", "b", "b.b", "*.a.b", "_x.a.b", "c")


@dataclass(frozen=True)
class Case:
    """A leaf, and what is asked about it."""

    leaf: x509.Certificate
    name: str
    profile: Profile = Profile.SERVER
    hours: int = 1

    def verdict(self, trust: Trust, *issuers: OperatorCA) -> Verified | str:
        deadline = NOW + timedelta(hours=self.hours)
        expected = Expectation(self.profile, (self.name,), KEY.public_key(), NOW, deadline, exact=False)
        try:
            chain = pem(*(one.certificate for one in issuers))
            return verify_certificate(pem(self.leaf), chain, trust, expected)
        except MaterialError as error:
            return str(error)


def without_shortcut(case: Case, anchor: OperatorCA, *issuers: OperatorCA) -> Verified | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_module, "_paths_returned", lambda *_: ())
        return case.verdict(verify_trust(TrustBundle(anchor.pem), NOW), *issuers)


def some_names(dice: random.Random) -> Iterator[x509.GeneralName]:
    """Names of all kinds, most of them of hosts."""
    for _ in range(dice.randint(0, 2)):
        domain = dice.choice(DOMAINS)
        yield dice.choice(
            [
                *6 * [DNS(domain)],
                URI(f"spiffe://{domain}/x"),
                MAIL(f"m@{domain}"),
                x509.IPAddress(ipaddress.ip_address(dice.choice(["10.0.0.1", "11.0.0.1", "::1"]))),
            ]
        )


def some_bases(dice: random.Random) -> list[x509.GeneralName] | None:
    bases: list[x509.GeneralName] = []
    for _ in range(dice.randint(1, 3)):
        domain = dice.choice(["b", "b", *(one for one in DOMAINS if "*" not in one)])
        domain = dice.choice(["", "", "", "."]) + domain
        bases.append(
            dice.choice(
                [
                    *15 * [DNS(domain)],
                    DNS(""),
                    URI(domain),
                    MAIL(domain),
                    x509.IPAddress(ipaddress.ip_network("10.0.0.0/8")),
                    x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])),
                ]
            )
        )
    return bases


def some_constraints(dice: random.Random) -> x509.NameConstraints | None:
    permitted = some_bases(dice) if dice.random() < 0.6 else None
    excluded = some_bases(dice) if dice.random() < 0.2 else None
    return x509.NameConstraints(permitted, excluded) if permitted or excluded else None


def some_leaf(dice: random.Random, issuer: OperatorCA) -> Case:
    profile = dice.choice([Profile.SERVER, Profile.GUEST])
    name = dice.choice([one for one in DOMAINS if one[0] not in "*_"]).lower()
    subject = [x509.NameAttribute(NameOID.COMMON_NAME, dice.choice(["leaf", "other", "Issuing", "Root"]))]
    if dice.random() < 0.1:
        subject.append(x509.NameAttribute(NameOID.EMAIL_ADDRESS, f"m@{dice.choice(DOMAINS)}"))
    leaf = issuer.leaf(
        KEY.public_key(),
        [name],
        usages=[SERVER_AUTH if profile is Profile.SERVER else CLIENT_AUTH],
        other_names=some_names(dice),
        subject=x509.Name(subject),
        valid=dice.choice([LONG, SHORT]),
        identifiers=dice.random() < 0.9,
        authority_key=dice.choice([None, None, None, None, ANOTHER_KEY]),
    )
    return Case(leaf, name, profile, dice.choice([1, 3]))


def compared(seed: int) -> tuple[int, int]:
    """Hold verdicts about leaves of one random authority against those of full validation."""
    dice = random.Random(seed)
    usages = [None, None, None, [SERVER_AUTH], [CLIENT_AUTH, SERVER_AUTH]]
    anchor = OperatorCA(
        "Root", valid=LONG, extended_usage=dice.choice(usages), constraints=some_constraints(dice)
    )
    issuing = OperatorCA(
        "Issuing",
        anchor,
        valid=dice.choice([LONG, SHORT]),
        extended_usage=dice.choice(usages),
        constraints=some_constraints(dice),
    )
    issuers = dice.choice([[issuing], [issuing], []])
    signer = issuing if issuers else anchor
    trust = verify_trust(TrustBundle(anchor.pem), NOW)
    held = 0
    for _ in range(12):
        case = some_leaf(dice, signer)
        found = case.verdict(trust, *issuers)
        assert found == without_shortcut(case, anchor, *issuers), f"seed {seed}"
        held += isinstance(found, Verified)
    return held, sum(bool(way._proven) for way in sum(trust.paths.values(), ()))


def test_what_is_proven_changes_no_verdict_about_names_uses_and_times() -> None:
    outcomes = [compared(seed) for seed in range(60)]
    assert sum(held for held, _ in outcomes) > 100
    assert sum(proven for _, proven in outcomes) > 15


def test_a_constrained_ca_that_is_proven_is_not_validated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor = OperatorCA(
        "Root", valid=LONG, constraints=x509.NameConstraints([DNS("firebuild.internal")], None)
    )
    issuing = OperatorCA("Issuing", anchor, valid=LONG)
    trust = verify_trust(TrustBundle(anchor.pem), NOW)
    good, bad = (
        Case(issuing.leaf(KEY.public_key(), [name], valid=LONG), name) for name in (NAME, "b.example.com")
    )
    assert isinstance(good.verdict(trust, issuing), Verified)
    monkeypatch.setattr(verify_module, "_strict", None)
    assert isinstance(good.verdict(trust, issuing), Verified)
    monkeypatch.undo()
    assert "do not permit the name" in str(bad.verdict(trust, issuing))


def test_what_is_known_of_paths_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_MAX_PATHS", 2)
    anchor = OperatorCA("Root", valid=LONG)
    trust = verify_trust(TrustBundle(anchor.pem), NOW)
    for _ in range(5):
        issuing = OperatorCA("Issuing", anchor, valid=LONG)
        case = Case(issuing.leaf(KEY.public_key(), [NAME], valid=LONG), NAME)
        assert isinstance(case.verdict(trust, issuing), Verified)
    assert len(trust.paths) <= 3
    assert all(isinstance(one, CertificationPath) for paths in trust.paths.values() for one in paths)
