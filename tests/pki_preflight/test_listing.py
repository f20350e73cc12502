"""Installed providers, and certificates in words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from firebuild_pki import PluginCatalog
from firebuild_pki.keys import KeyType, generate_key
from firebuild_pki.preflighting import certificate_facts, list_providers
from pki import conftest
from pki.conftest import Install
from pki.tools import CLIENT_AUTH, NOW, SERVER_AUTH, OperatorCA, entry, pem

install = conftest.install


def test_a_usable_provider_says_what_it_is_and_where() -> None:
    [listed] = [one for one in list_providers() if one.name == "embedded"]
    assert listed.distribution == "firebuild"
    assert Path(listed.location).name == "embedded.py"
    assert listed.capabilities == ("peer", "sign", "uri-names")
    assert listed.problem is None
    assert list(listed.to_json()) == [
        *("name", "distribution", "version", "location", "summary", "capabilities", "problem", "hint"),
        "kind",
    ]


def test_broken_and_doubled_providers_are_rows_beside_the_others(install: Install) -> None:
    install("acme-broken", "import nowhere_at_all", name="acme", module="acme_broken")
    for number in "12":
        install(f"twins-{number}", "", name="twin", module=f"twin_{number}")
    listed = {(one.name, one.distribution): one for one in list_providers()}
    broken = listed["acme", "acme-broken"]
    assert "No module named 'nowhere_at_all'" in (broken.problem or "")
    assert broken.location.endswith("acme-broken")
    assert (broken.summary, broken.capabilities) == ("", ())
    for number in "12":
        twin = listed["twin", f"twins-{number}"]
        assert twin.problem == 'the provider name "twin" is claimed by twins-1 1.2 and twins-2 1.2'
        assert twin.hint == "uninstall all but one"
    assert listed["embedded", "firebuild"].problem is None


def test_a_provider_without_a_distribution_has_no_location_if_it_is_broken() -> None:
    catalog = PluginCatalog(providers=[entry("ghost", "nowhere_at_all")], key_stores=[])
    [ghost] = list_providers(catalog)
    assert (ghost.location, ghost.distribution) == ("", "nowhere_at_all")


def test_a_leaf_in_words() -> None:
    ca = OperatorCA()
    usages = [SERVER_AUTH, CLIENT_AUTH, x509.ObjectIdentifier("1.2.3.4")]
    names = ["a.example", "b.example"]
    leaf = ca.leaf(generate_key(KeyType.RSA2048).public_key(), names, usages=usages, serial=0xBEEF)
    [facts, root] = certificate_facts(pem(leaf) + ca.pem)
    assert facts.subject == "CN=leaf"
    assert facts.issuer == root.subject == root.issuer == "CN=Operator Root"
    assert facts.names == ("a.example", "b.example")
    assert facts.not_after == NOW + timedelta(hours=1)
    assert (facts.serial, facts.key) == ("beef", "RSA 2048")
    assert facts.usages == ("digitalSignature", "serverAuth", "clientAuth", "1.2.3.4")
    assert (root.key, root.names) == ("EC secp256r1", ())
    assert root.usages == ("digitalSignature", "keyCertSign")
    document = facts.to_json()
    assert document["not_after"] == "2030-05-17T13:00:00+00:00"
    assert document["names"] == ["a.example", "b.example"]


def test_a_certificate_without_usages_and_with_a_rare_key() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(1))
        .sign(key, None)
    )
    [facts] = certificate_facts(certificate.public_bytes(serialization.Encoding.PEM))
    assert (facts.subject, facts.usages, facts.key) == ("", (), "Ed25519")


def test_other_text_is_refused() -> None:
    with pytest.raises(Exception, match="expected PEM certificates as input"):
        certificate_facts(b"nothing")


def test_key_stores_are_listed_behind_the_providers() -> None:
    listed = list_providers()
    kinds = [one.kind for one in listed]
    assert kinds == sorted(kinds, reverse=True)
    (tokens,) = [one for one in listed if one.kind == "key store"]
    assert (tokens.name, tokens.distribution) == ("pkcs11", "firebuild-pki-pkcs11")
    assert tokens.summary.startswith("keys in PKCS#11 tokens")
    assert tokens.to_json()["kind"] == "key store"


def test_a_key_store_that_cannot_be_used_says_why() -> None:
    gone_away = entry("gone", "nowhere_at_all", "firebuild_pki.key_stores")
    catalog = PluginCatalog(providers=[], key_stores=[gone_away])
    (gone,) = list_providers(catalog)
    assert (gone.name, gone.kind) == ("gone", "key store")
    assert "nowhere_at_all" in (gone.problem or "")
