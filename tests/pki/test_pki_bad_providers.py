"""What a provider hands back is checked; each flaw is caught with words of its own."""

from __future__ import annotations

from datetime import timedelta

import pytest

from firebuild_pki import (
    CAError,
    MaterialError,
    Profile,
    ProviderError,
    UnsupportedOperation,
    order_chain,
)
from firebuild_pki.chain import build_chain
from firebuild_pki.keys import generate_key
from pki import signers
from pki.tools import NOW, OperatorCA, certificates, opened, pem

SORTED = "is out of order, and was sorted"
ROOT = "holds a root, which was left out"
LEAF = "holds the leaf, which was left out"
TWICE = "holds a certificate twice, which was left out"


@pytest.mark.parametrize(
    ("name", "remarks"),
    [
        ("good", []),
        ("reversed-chain", [ROOT, SORTED]),
        ("repeated", [TWICE, LEAF, ROOT]),
        ("no-newlines", [ROOT]),
        ("text", []),
        ("chain-in-bundle", []),
        ("several-anchors", [ROOT]),
    ],
)
def test_what_can_be_put_right_is_put_right_and_remarked(name: str, remarks: list[str]) -> None:
    with opened(name) as authority:
        for material in (authority.issue_server(), authority.issue_guest()):
            subjects = [one.subject.rfc4514_string() for one in certificates(material.certificate_chain_pem)]
            assert subjects == ["CN=leaf", *INTERMEDIATES.get(name, ["CN=Operator Intermediate"])]
        expected = [f"the chain that the provider returned {remark}" for remark in remarks]
        assert list(authority.warnings) == expected


INTERMEDIATES = {"reversed-chain": ["CN=Operator Issuing", "CN=Operator Intermediate"]}


def test_a_heap_of_certificates_becomes_a_chain() -> None:
    root = OperatorCA("Root")
    upper = OperatorCA("Upper", root)
    lower = OperatorCA("Lower", upper)
    leaf = pem(lower.leaf(generate_key().public_key(), ["a.b"]))
    heap = root.pem + upper.pem + leaf + OperatorCA("Stranger", root).pem + lower.pem + upper.pem
    assert order_chain(leaf, heap) == lower.pem + upper.pem
    assert order_chain(leaf, b"") == b""
    assert order_chain(leaf + lower.pem, upper.pem) == lower.pem + upper.pem
    with pytest.raises(MaterialError, match="expected PEM certificates as chain"):
        order_chain(leaf, b"junk")


def test_a_cross_signed_issuer_is_followed_to_the_anchor_that_is_trusted() -> None:
    old, new = OperatorCA("Old Root"), OperatorCA("New Root")
    lower = OperatorCA("Lower", old)
    crossed = OperatorCA("Lower", new, key=lower.key)
    upper = OperatorCA("Upper", old)
    leaf = lower.leaf(generate_key().public_key(), ["a.b"])
    for root, issuer in ((old, lower), (new, crossed)):
        pool = [one.certificate for one in (upper, lower, crossed)]
        chain = build_chain(leaf, pool, [root.certificate])
        assert chain.issuers == (issuer.certificate,)
    assert order_chain(pem(leaf), lower.pem + upper.pem + crossed.pem) == lower.pem + crossed.pem
    with pytest.raises(MaterialError, match=r'"CN=Lower" .* was issued by "CN=New Root"'):
        build_chain(leaf, [crossed.certificate], [old.certificate])


def test_trusting_an_intermediate_alone_is_enough() -> None:
    with opened("intermediate-trusted") as authority:
        material = authority.issue_server()
        assert len(certificates(material.certificate_chain_pem)) == 1
        (anchor,) = certificates(material.trust_pem)
        assert anchor.subject.rfc4514_string() == "CN=Operator Intermediate"


WARNINGS = [
    ("remarking", "the backend says hi"),
    (
        "longer",
        "the CA extended the lifetime of the server certificate: "
        "asked until 2030-05-17 13:00:00Z, got 2030-05-17 17:00:00Z",
    ),
    (
        "both-usages",
        "expected the extended key usage serverAuth and nothing else in the server certificate, "
        "found: clientAuth, serverAuth",
    ),
    ("no-key-usage", "the certificate has no key usage extension"),
    ("lax-key-usage", "the key usage extension is not critical"),
    ("small-serial", "the serial number looks shorter than 64 random bits"),
    ("old-style", "strict TLS libraries may refuse the chain: "),
    ("intermediate-old-style", 'strict TLS libraries may refuse "CN=Operator Intermediate" (sha256 '),
]


@pytest.mark.parametrize(("name", "warning"), WARNINGS)
def test_what_is_merely_unwise_is_a_warning(name: str, warning: str) -> None:
    with opened(name) as authority:
        assert authority.issue_server()
        assert any(text.startswith(warning) for text in authority.warnings)


def test_what_harms_nobody_is_a_remark_and_no_warning() -> None:
    with opened("encipherment") as authority:
        authority.issue_server()
        authority.issue_guest()
        assert authority.warnings == ()
        assert authority.remarks == ("the key usage has keyEncipherment, which means nothing for an EC key",)


LEAF = r'"CN=leaf" \(sha256 [0-9a-f]{16}…\)'
WANTED = "expected a certificate for b.firebuild.internal"
USAGE = "expected the extended key usage serverAuth and nothing else in the server certificate, found: "
INTERMEDIATE = r'"CN=Operator Intermediate" \(sha256 [0-9a-f]{16}…\)'
RENEW = r"\(hint: renew it, or set the clock of this machine\)"

REFUSALS = [
    ("wrong-key", f"the certificate {LEAF} is for another public key than the one requested"),
    ("wrong-names", f"{WANTED}, found subject alternative names: somebody.else.example"),
    (
        "more-names",
        rf"{WANTED} and nothing else, found subject alternative names: "
        r"\*\.firebuild\.internal, b\.firebuild\.internal",
    ),
    (
        "more-kinds",
        f"{WANTED} and nothing else, found subject alternative names: "
        "b.firebuild.internal, https://example.com/",
    ),
    ("no-names", f"{WANTED}, found subject alternative names: none"),
    ("any-usage", f"{USAGE}anyExtendedKeyUsage"),
    ("any-usage-besides", f"{USAGE}anyExtendedKeyUsage, clientAuth, serverAuth"),
    ("third-usage", f"{USAGE}1.3.6.1.5.5.7.3.3, clientAuth, serverAuth"),
    ("swapped-usage", f"{USAGE}clientAuth"),
    ("no-usage", f"{USAGE}none"),
    ("leaf-is-ca", f"expected an end-entity certificate, but {LEAF} is a CA"),
    ("no-signature-usage", "the key usage of the certificate lacks digitalSignature, which TLS 1.3 needs"),
    ("signing-usage", "the key usage of the certificate has keyCertSign; only a CA may"),
    ("expired", rf"{LEAF} expired at 2030-05-17 11:59:59Z, now is 2030-05-17 12:00:00Z {RENEW}"),
    (
        "not-yet",
        rf"{LEAF} is not valid before 2030-05-17 12:03:00Z, now is 2030-05-17 12:00:00Z "
        r"\(hint: compare the clocks of this machine and of the CA\)",
    ),
    (
        "missing-intermediate",
        rf'the chain has a missing link: {LEAF} was issued by "CN=Operator Intermediate", which is neither '
        r'in the chain nor among the trust anchors \(hint: the trust anchors are "CN=Operator Root" '
        r"\(sha256 [0-9a-f]{16}…\); add the missing CA certificate to the chain\)",
    ),
    (
        "other-root",
        rf'the chain has a missing link: {INTERMEDIATE} was issued by "CN=Operator Root", which is .*',
    ),
    (
        "other-root-sent",
        rf'the chain has a missing link: {INTERMEDIATE} was issued by "CN=Operator Root", which is .*',
    ),
    ("intermediate-no-ca", rf"path validation refuses the chain of {LEAF}: .*"),
    (
        "intermediate-cannot-sign",
        rf"path validation refuses the chain of {LEAF}: .*{INTERMEDIATE} does not allow signing.*",
    ),
    (
        "intermediate-other-purpose",
        rf"path validation refuses the chain of {LEAF}: .*{INTERMEDIATE} forbids this kind of leaf.*",
    ),
    (
        "intermediate-expired",
        rf"{INTERMEDIATE} expired at 2030-05-17 11:55:00Z, now is 2030-05-17 12:00:00Z {RENEW}",
    ),
    ("garbage", "expected PEM certificates as certificate, but they cannot be read: .*"),
    ("broken-pem", "expected PEM certificates as chain, but they cannot be read: .*"),
    ("no-bytes", "expected PEM text as chain, found NoneType"),
    ("nothing", "expected a SignedCertificate, found NoneType"),
]


@pytest.mark.parametrize(("name", "message"), REFUSALS)
def test_what_breaks_the_contract_is_refused(name: str, message: str) -> None:
    wanted = rf"^ca-provider\({name}\): {message}$"
    with opened(name) as authority, pytest.raises(MaterialError, match=wanted):
        authority.issue_server()


def test_too_short_a_life_is_only_refused_where_the_build_needs_more() -> None:
    with opened("too-short") as authority:
        authority.issue_server(build_deadline=NOW + timedelta(minutes=10))
        with pytest.raises(MaterialError, match="may need it until 2030-05-17 12:10:01Z"):
            authority.issue_server(build_deadline=NOW + timedelta(minutes=10, seconds=1))


def test_what_the_backend_remarked_is_part_of_the_hint() -> None:
    with opened("too-short-but-told") as authority:
        authority.issue_server()
        with pytest.raises(MaterialError) as caught:
            authority.issue_server(build_deadline=NOW + timedelta(minutes=11))
    assert caught.value.hint == (
        "shorten the build's timeout, or let the CA issue for longer; raise max_ttl of the role"
    )


def test_a_foreign_exception_is_wrapped_and_kept_as_the_cause() -> None:
    with opened("raising") as authority, pytest.raises(ProviderError) as caught:
        authority.issue_guest()
    assert str(caught.value) == (
        "ca-provider(raising): issuing the guest certificate failed: KeyError: 'certificate'"
    )
    assert isinstance(caught.value.__cause__, KeyError)
    assert not caught.value.retryable


def test_a_network_fault_may_be_retried() -> None:
    with opened("unreachable") as authority, pytest.raises(ProviderError) as caught:
        authority.issue_guest()
    assert caught.value.retryable


def test_the_words_of_a_provider_are_kept() -> None:
    with opened("explaining") as authority, pytest.raises(CAError) as caught:
        authority.issue_guest()
    assert str(caught.value) == (
        "ca-provider(explaining): the role does not allow it (hint: set allow_subdomains)"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("untrusted", "reading the trust bundle failed: ValueError: no anchors"),
        ("no-bundle", "expected a TrustBundle, found NoneType"),
        ("odd-bundle", "expected PEM text as intermediates, found NoneType"),
        (
            "leaf-as-anchor",
            r'"CN=Operator Root" \(sha256 .*\) in the trust bundle is not a CA \(hint: leave it out: .*\)',
        ),
        (
            "plain-anchor",
            r'"CN=Operator Root" \(sha256 .*\) in the trust bundle is not a CA \(hint: leave it out: .*\)',
        ),
        ("expired-anchor", r'"CN=Operator Root" \(sha256 .*\) expired at 2030-05-17 11:55:00Z, .*'),
        ("bad-factory", "making the provider failed: RuntimeError: no factory today"),
        ("wrong-factory", "expected its factory to make a CAProvider, found object"),
    ],
)
def test_a_provider_that_cannot_be_opened_says_why(name: str, message: str) -> None:
    with pytest.raises(CAError, match=rf"^ca-provider\({name}\): {message}$"):
        opened(name)


def test_methods_left_out_are_named() -> None:
    with opened("no-methods") as authority:
        assert authority.check() == ()
        with pytest.raises(UnsupportedOperation, match="signing a server certificate is not implemented"):
            authority.issue_server()
    provider = signers.Anchored()
    with pytest.raises(UnsupportedOperation, match="a ready guest pair is not implemented"):
        provider.ready_pair(Profile.GUEST)
    with pytest.raises(UnsupportedOperation, match="revoking is not implemented"):
        provider.revoke(b"")
