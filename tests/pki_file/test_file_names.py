"""Whom a finished certificate names: one full DNS name, chosen where there are several."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pki_file.finished import Pairs, issued, pairs_of, refusal
from pki_file.operator_files import LEAF, Shop

pytestmark = pytest.mark.needs("openssl")


def end(name: str, usage: str) -> str:
    return f"{LEAF}\nextendedKeyUsage={usage}" + (f"\nsubjectAltName={name}" if name else "")


def with_server(usual: Shop, names: str) -> Pairs:
    usual.issue("other-server", "builds", end(names, "serverAuth"), subject="/CN=server")
    return pairs_of(usual, usual.path("builds.pem"), server="other-server")


def with_client(usual: Shop, names: str) -> Pairs:
    usual.issue("other-client", "builds", end(names, "clientAuth"), subject="/CN=alice")
    return pairs_of(usual, usual.path("builds.pem"), client="other-client")


NAMES = {
    "DNS:builds.example.com": "builds.example.com",
    "DNS:*.example.com,DNS:builds.example.com": "builds.example.com",
    "DNS:Builds.Example.COM": "Builds.Example.COM",
    "DNS:localhost": "localhost",
    "IP:127.0.0.1,DNS:builds.example.com": "builds.example.com",
}


@pytest.mark.parametrize("names", NAMES)
def test_the_only_full_name_of_the_server_is_its_name(names: str, usual: Shop) -> None:
    server, guest = issued(with_server(usual, names))
    assert server.server_name == guest.server_name == NAMES[names]


def test_of_several_names_the_setting_chooses(usual: Shop) -> None:
    block = with_server(usual, "DNS:a.example.com,DNS:b.example.com")
    error = refusal(block)
    assert error.message.endswith("has several DNS names: a.example.com, b.example.com")
    assert error.hint == "set server_name to one of them, for example server_name: a.example.com"
    server, _ = issued(block, server_name="B.example.com")
    assert server.server_name == "b.example.com"


def test_a_chosen_name_that_is_not_there_is_refused(usual: Shop) -> None:
    block = with_server(usual, "DNS:a.example.com,DNS:*.example.com")
    error = refusal(block, server_name="b.example.com")
    assert "has no DNS name b.example.com, which server_name chooses; it has a.example.com" in error.message
    assert "a name that only a wildcard covers does not count" in str(error.hint)


NAMELESS = {
    "": "found the common name",
    "email:alice@example.com": "found the e-mail address alice@example.com and the common name",
    "URI:spiffe://example.com/ci": "found the URI spiffe://example.com/ci and the common name",
    "IP:127.0.0.1": "found the IP address 127.0.0.1 and the common name",
    "DNS:*.example.com": "found *.example.com and the common name",
    "RID:1.2.3.4": "found a name <ObjectIdentifier(oid=1.2.3.4, name=Unknown OID)> and the common name",
}


@pytest.mark.parametrize("names", NAMELESS)
@pytest.mark.parametrize("which", [with_server, with_client])
def test_a_certificate_without_a_full_dns_name_is_refused(
    names: str, which: Callable[[Shop, str], Pairs], usual: Shop
) -> None:
    error = refusal(which(usual, names))
    assert 'expected a full DNS name in "CN=' in error.message
    assert NAMELESS[names] in error.message
    assert ("a wildcard cannot be an identity" in str(error.hint)) == ("*" in names)
    assert "subjectAltName=DNS:" in str(error.hint)


def test_a_certificate_without_any_name_is_refused(usual: Shop, shop: Shop) -> None:
    usual.issue("nameless", "builds", end("", "clientAuth"), subject="/O=Operator")
    error = refusal(pairs_of(usual, usual.path("builds.pem"), client="nameless"))
    assert error.message.endswith("found no name at all")


def test_a_server_name_that_is_no_host_name_is_refused(usual: Shop) -> None:
    error = refusal(with_server(usual, "DNS:my_builds.example.com"))
    assert 'my_builds.example.com in "CN=server" (sha256 ' in error.message
    assert error.message.endswith("is not a DNS name")


def test_a_client_may_have_several_names(usual: Shop) -> None:
    _, guest = issued(with_client(usual, "DNS:one.example.com,DNS:two.example.com"))
    assert guest.identity == "one.example.com"
