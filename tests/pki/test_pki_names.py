"""What a name is, DNS names and URIs; labels; certificates with exactly the names that were asked for."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
from cryptography import x509

from firebuild_pki import (
    IdentityError,
    MaterialError,
    Profile,
    TLSMaterial,
    UnsupportedOperation,
    open_authority,
)
from firebuild_pki.names import Identity, Names, audit_labels, check_uri, checked_labels
from pki import characters
from pki.tools import CLIENT_AUTH, NOW, SERVER_AUTH, Clock, ca_settings, catalog_of, leaf_of, opened

SPIFFE = "spiffe://example.org/build/agent"
"""An id as a workload has it."""


@pytest.mark.parametrize(
    "name",
    [
        "localhost",
        "db.example.com",
        "xn--bcher-kva.example",
        SPIFFE,
        "spiffe://td_1.x-y/A_b.c-d",
        "spiffe://10.0.0.1/a",
        "https://example.com/jobs/7?x=1",
        "urn+x://host",
    ],
)
def test_dns_names_and_uris_are_names(name: str) -> None:
    assert Names.of(name).all == (name,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "expected a DNS name"),
        ("Db.example.com", "use lower-case letters"),
        ("*.example.com", "without a wildcard"),
        ("a..b", "expected a DNS name"),
        ("a b", "expected a DNS name"),
        ("a_b.c", "expected a DNS name"),
        ("10.0.0.1", "addresses are neither"),
        ("::1", "expected a DNS name"),
        ("x" * 64, "expected a DNS name"),
        (".".join(["a" * 50] * 6), "longer than 253"),
        ("a\x1b[31m", "a\\x1b"),
        ("spiffe:example.org/a", "expected a DNS name"),
        ("spiffe://example.org", "no workload in it"),
        ("spiffe://example.org/", "no empty segment"),
        ("spiffe://example.org/a/", "no slash at its end"),
        ("spiffe://example.org//a", "no empty segment"),
        ("spiffe://example.org/a/../b", "no segment . or .."),
        ("spiffe://example.org/a/./b", "no segment . or .."),
        ("spiffe://example.org/a%20b", "segments of a path"),
        ("spiffe://example.org/a?b", "segments of a path"),
        ("spiffe://example.org/a#b", "segments of a path"),
        ("spiffe://example.org/é", "segments of a path"),
        ("spiffe://Example.org/a", "trust domain has lower-case"),
        ("spiffe://example.org:8443/a", "trust domain has lower-case"),
        ("spiffe://me@example.org/a", "trust domain has lower-case"),
        ("spiffe:///a", "trust domain has lower-case"),
        (f"spiffe://{'x' * 256}/a", "255 at most"),
        ("SPIFFE://example.org/a", "written in lower case"),
        (f"spiffe://example.org/{'x' * 2048}", "longer than 2048 bytes"),
        ("https://", "printable ASCII"),
        ("https:///path", "it has no host"),
        ("https://[::1/path", "it has no host"),
        ("https://a b/", "printable ASCII"),
        (f"https://a/{'x' * 2048}", "longer than 2048 characters"),
    ],
)
def test_what_is_no_name_is_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(IdentityError) as caught:
        Names.of(name)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)


def test_names_are_bounded_and_each_is_there_once() -> None:
    for names, words in (
        ([], "a name at least"),
        (["a.b", "a.b"], '"a.b" is there twice'),
        ([f"a{number}.b" for number in range(101)], "100 names at most, found 101"),
        ([SPIFFE, "https://a/b"], "a SPIFFE ID and no other URI, found 2"),
        ([b"a.b"], "as a string, found bytes"),
    ):
        with pytest.raises(IdentityError, match=words):
            Names.of(names)  # type: ignore[arg-type]
    assert Names.of(["https://a/b", "a.b", "https://a/c"]) == Names(("a.b",), ("https://a/b", "https://a/c"))


def test_labels_are_bounded_and_harmless() -> None:
    assert checked_labels({"image-tag": "app:1"}) == {"image-tag": "app:1"}
    for labels, words in (
        ({str(number): "" for number in range(17)}, "16 labels at most"),
        ({"Tag": "x"}, 'found "Tag"'),
        ({"x\ny": "x"}, "the key of a label"),
        ({"tag": "x" * 257}, "256 printable ASCII"),
        ({"tag": "a\r\nX-Vault-Token: b"}, "256 printable ASCII"),
        ({"tag": "é"}, "256 printable ASCII"),
        ({"tag": 5}, "256 printable ASCII"),
    ):
        with pytest.raises(IdentityError, match=words):
            checked_labels(labels)  # type: ignore[arg-type]
    with pytest.raises(IdentityError, match="16 labels at most"):
        open_authority(labels={str(number): "" for number in range(17)})


def test_labels_are_made_of_anything() -> None:
    texts = {"tag": "größe\n\x1b[31m:1", "image": "x" * 1000, "note": ""}
    made = audit_labels(**texts)
    assert made["tag"] == r"gr\xf6\xdfe\n\x1b[31m:1"
    assert made["image"] == "x" * 256
    assert made["requester"].endswith(f"@{socket.gethostname()}")
    assert sorted(made) == ["image", "requester", "tag"]
    assert checked_labels(made) == made


def test_a_peer_with_a_spiffe_id_has_that_name_and_both_usages() -> None:
    characters.witness.events.clear()
    settings = ca_settings({"observers": ["witness"]}, catalog_of(observers=["witness"]))
    announced = (SPIFFE, "db.example.com", "https://jobs.example.com/7")
    with open_authority(settings, build_id="b", labels={"tag": "app:1"}, names=announced) as authority:
        alone = authority.issue(Profile.PEER, SPIFFE, labels={"requester": "ci"})
        both = authority.issue(Profile.PEER, ["db.example.com", SPIFFE])
        client = authority.issue(Profile.CLIENT, ["https://jobs.example.com/7"], server_name="db.example.com")
        warnings = authority.warnings
    assert warnings == ()
    assert _names(alone) == [SPIFFE]
    assert (alone.identity, alone.server_name, alone.names) == (SPIFFE, "", (SPIFFE,))
    assert _names(both) == ["db.example.com", SPIFFE]
    assert both.server_name == "db.example.com"
    assert _usages(alone) == _usages(both) == {SERVER_AUTH, CLIENT_AUTH}
    assert _usages(client) == {CLIENT_AUTH}
    assert client.server_name == "db.example.com"
    first, second = characters.witness.events[:2]
    assert first.names == (SPIFFE,)
    assert first.profile == "peer"
    assert first.labels == {"tag": "app:1", "requester": "ci"}
    assert second.labels == {"tag": "app:1"}


def test_a_server_has_a_dns_name() -> None:
    with (
        open_authority() as authority,
        pytest.raises(IdentityError, match=r"known by its URI is a Profile.PEER"),
    ):
        authority.issue(Profile.SERVER, SPIFFE)


def test_a_provider_that_cannot_do_uris_or_peers_is_not_asked() -> None:
    with opened("good") as authority:
        with pytest.raises(UnsupportedOperation) as caught:
            authority.issue(Profile.CLIENT, SPIFFE)
        assert str(caught.value) == (
            "ca-provider(good): this provider cannot sign certificates with URIs as names, such as "
            f"{SPIFFE} (hint: embedded, file, vault and cfssl can; `firebuild ca providers` lists what each "
            "installed one can)"
        )
        with pytest.raises(UnsupportedOperation, match="for both ends of a connection"):
            authority.issue(Profile.PEER, "a.b")


def test_a_provider_of_finished_certificates_has_those_of_the_build_alone() -> None:
    with opened("pairs") as authority:
        assert authority.issue_server().names == ("builds.example.com",)
        with pytest.raises(UnsupportedOperation, match="finished certificates for a build's two ends"):
            authority.issue(Profile.SERVER, "db.example.com")


@pytest.mark.parametrize("name", ["no-uri", "other-uri", "more-uris"])
def test_a_certificate_without_exactly_the_uris_is_refused(name: str) -> None:
    with opened("uris-too") as authority:
        assert _names(authority.issue(Profile.CLIENT, ["a.b", SPIFFE])) == ["a.b", SPIFFE]
    with opened(name) as authority, pytest.raises(MaterialError, match=f"certificate for a.b, {SPIFFE}"):
        authority.issue(Profile.CLIENT, ["a.b", SPIFFE])


def test_a_ca_of_one_build_certifies_what_was_announced_and_nothing_else() -> None:
    with open_authority(names=SPIFFE) as authority:
        authority.issue(Profile.PEER, SPIFFE)
        for name in ("spiffe://elsewhere.example/x", "db.example.com"):
            with pytest.raises(MaterialError, match="name constraints") as refused:
                authority.issue(Profile.PEER, name)
            assert refused.value.hint == "announce the names: open_authority(names=…)"


def test_the_successor_of_a_certificate_is_due_at_two_thirds_of_its_life_or_a_little_earlier() -> None:
    clock = Clock()
    settings = ca_settings({"embedded": {"backdate": "0s"}})
    announced = ("db.example.com", SPIFFE)
    with open_authority(settings, build_id="b", clock=clock, names=announced) as authority:
        old = authority.issue(Profile.PEER, ["db.example.com", SPIFFE], timedelta(hours=12))
        others = [authority.issue_guest(ttl=timedelta(hours=12)) for _ in range(8)]
        moments = {one.renew_at for one in (old, *others)}
        assert len(moments) == 9
        assert min(moments) >= NOW + timedelta(hours=7)
        assert max(moments) <= NOW + timedelta(hours=8)
        assert not old.renewal_due(NOW + timedelta(hours=7) - timedelta(seconds=1))
        clock.advance(hours=8)
        assert old.renewal_due(clock())
        new = authority.renew(old)
        assert (new.names, new.profile, new.ttl) == (old.names, old.profile, old.ttl)
        assert new.private_key_pem != old.private_key_pem
        assert new.not_after == NOW + timedelta(hours=20)
        assert old.not_after > clock()
        assert not new.renewal_due(clock())
        shorter = authority.renew(new, ttl=timedelta(hours=1))
        assert shorter.not_after == NOW + timedelta(hours=9)


def _names(material: TLSMaterial) -> list[str]:
    extension = leaf_of(material).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in extension.value]


def _usages(material: TLSMaterial) -> set[x509.ObjectIdentifier]:
    return set(leaf_of(material).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("spiffe://example.org/" + "é" * 1100, "it is longer than 2048 bytes"),
        ("https://example.org/" + "a" * 2048, "it is longer than 2048 characters"),
        ("HTTPS example.org", "it has a lower-case scheme, then ://, then printable ASCII characters"),
    ],
    ids=["spiffe", "https", "no scheme"],
)
def test_a_uri_that_no_peer_reads_is_refused_with_the_reason(uri: str, why: str) -> None:
    with pytest.raises(IdentityError) as caught:
        check_uri(uri)
    assert why in str(caught.value)


@pytest.mark.parametrize(("build_id", "suffix"), [("a\n\x1b[31m", "x.test"), ("b1", "a\n\x1b[31m")])
def test_a_name_that_is_refused_is_shown_in_one_line(build_id: str, suffix: str) -> None:
    with pytest.raises(IdentityError, match=r'found "a \\x1b\[31m"'):
        Identity(build_id, suffix)
