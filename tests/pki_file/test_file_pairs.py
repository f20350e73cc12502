"""Finished certificates: nothing is signed, everything is checked, and the ends talk."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from firebuild_pki import (
    AuthorityClosed,
    MaterialError,
    Profile,
    ProviderContext,
    SignRequest,
    UnsupportedOperation,
)
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keys import generate_key
from firebuild_pki.provider import utc_now
from firebuild_pki.x509 import make_csr
from pki.tools import certificates, leaf_of
from pki_file.finished import Pairs, issued, pairs_of, refusal
from pki_file.operator_files import CA, CLIENT, LEAF, SERVER, Shop, later, opened, settings_of

pytestmark = pytest.mark.needs("openssl")


@pytest.fixture
def pairs(usual: Shop) -> Pairs:
    """What the issue of a build needs, with the CA that signed both as the anchor."""
    return pairs_of(usual, usual.path("builds.pem"))


def test_the_operators_own_certificates_are_used_as_they_are(pairs: Pairs, usual: Shop) -> None:
    server, guest = issued(pairs)
    assert leaf_of(server) == certificates(usual.read("server.pem"))[0]
    assert leaf_of(guest) == certificates(usual.read("client.pem"))[0]
    assert server.server_name == guest.server_name == "builds.example.com"
    assert (server.identity, guest.identity) == ("builds.example.com", "guest.example.com")


SHAPES: dict[str, Callable[[Shop, Shop], Pairs]] = {
    "all CAs in ca_cert": lambda usual, shop: pairs_of(
        usual, shop.write("ca.pem", usual.read("policy.pem", "root.pem", "builds.pem"))
    ),
    "the CAs in chain": lambda usual, shop: {
        **pairs_of(usual, usual.path("root.pem")),
        "chain": shop.write("chain.pem", usual.read("policy.pem", "builds.pem")),
    },
    "the CAs with the certificates": lambda usual, shop: {
        **pairs_of(usual, usual.path("root.pem")),
        "server_cert": shop.write("s.pem", usual.read("server.pem", "builds.pem", "policy.pem")),
        "client_cert": shop.write("c.pem", usual.read("root.pem", "policy.pem", "builds.pem", "client.pem")),
    },
    "an anchor of its own": lambda usual, shop: {
        **pairs_of(usual, shop.write("ca.pem", usual.read("policy.pem", "builds.pem"))),
        "anchors": [usual.path("root.pem")],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_chains_come_in_any_shape(shape: str, usual: Shop, shop: Shop) -> None:
    for material in issued(SHAPES[shape](usual, shop)):
        sent = [one.subject.rfc4514_string() for one in certificates(material.certificate_chain_pem)]
        assert sent[1:] == ["CN=builds,O=Operator", "CN=policy,O=Operator"]
        assert certificates(material.trust_pem) == certificates(usual.read("root.pem"))


def test_the_two_ends_may_have_different_cas(usual: Shop, shop: Shop) -> None:
    shop.root("clients")
    shop.issue("client", "clients", CLIENT)
    both = shop.write("ca.pem", usual.read("builds.pem"), shop.read("clients.pem"))
    block = pairs_of(usual, both)
    block |= {
        "client_cert": shop.path("client.pem"),
        "client_key": shop.path("client.key"),
        "anchors": [usual.path("builds.pem"), shop.path("clients.pem")],
    }
    _, guest = issued(block)
    assert len(certificates(guest.trust_pem)) == 2


def test_a_root_in_the_file_of_a_pair_is_not_trusted(usual: Shop, shop: Shop) -> None:
    shop.root("own")
    shop.issue("server", "own", SERVER)
    both = shop.write("both.pem", shop.read("server.pem", "own.pem"))
    block = pairs_of(usual, usual.path("builds.pem"))
    error = refusal({**block, "server_cert": both, "server_key": shop.path("server.key")})
    assert 'was issued by "CN=own,O=Operator", which is neither in ca_cert nor in chain' in error.message


def test_encrypted_keys_have_their_own_passphrases(pairs: Pairs, usual: Shop, shop: Shop) -> None:
    environ = {"ONE": "first", "OTHER": "second"}
    for end, name in (("server", "ONE"), ("client", "OTHER")):
        written = shop.openssl(
            "pkcs8", "-topk8", "-passout", f"pass:{environ[name]}", given=usual.read(f"{end}.key")
        )
        pairs[f"{end}_key"] = shop.write(f"{end}.key", written)
        pairs[f"{end}_key_passphrase"] = {"env": name}
    issued(pairs, environ=environ)
    error = refusal(pairs, environ={"ONE": "first", "OTHER": "first"})
    assert error.message.endswith("client_key_passphrase does not decrypt the key")


def test_nothing_can_be_signed_or_revoked(pairs: Pairs) -> None:
    with opened(pairs) as authority, pytest.raises(UnsupportedOperation):
        authority.revoke(authority.issue_server())


def test_a_provider_that_is_closed_has_no_pairs_and_never_signs(pairs: Pairs) -> None:
    settings = settings_of({name: str(path) for name, path in pairs.items()})
    provider = settings.spec.factory(settings.provider_settings, ProviderContext(utc_now, {}))
    names = ("b.firebuild.internal",)
    request = SignRequest(make_csr(generate_key(), names), Profile.SERVER, names, timedelta(hours=1), "b")
    provider.open()
    shown = repr(provider.ready_pair(Profile.SERVER)) + repr(vars(provider))
    assert "PRIVATE KEY" not in shown
    provider.close()
    with pytest.raises(AuthorityClosed):
        provider.ready_pair(Profile.SERVER)
    with pytest.raises(UnsupportedOperation):
        provider.sign(request)


def test_swapped_pairs_are_noticed(usual: Shop) -> None:
    block = pairs_of(usual, usual.path("builds.pem"), server="client", client="server")
    error = refusal(block)
    assert error.message.startswith(
        f'server_cert {usual.path("client.pem")}: "CN=client,O=Operator" (sha256 '
    )
    assert "is for clients, and" in error.message
    assert error.hint == "swap the certificates, and their keys"


def test_swapped_certificates_are_noticed(pairs: Pairs, usual: Shop) -> None:
    pairs["server_cert"], pairs["client_cert"] = pairs["client_cert"], pairs["server_cert"]
    error = refusal(pairs)
    assert error.message.startswith(f"server_key {usual.path('server.key')}: the key does not fit ")
    assert str(error.hint).endswith(f"in client_cert {usual.path('server.pem')}")


def test_one_certificate_for_both_ends_is_allowed(usual: Shop) -> None:
    both = f"{LEAF}\nextendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=DNS:both.example.com"
    usual.issue("both", "builds", both)
    with opened(pairs_of(usual, usual.path("builds.pem"), server="both", client="both")) as authority:
        handshake(authority.issue_server(), authority.issue_guest())
        assert "extended key usage" in " ".join(authority.warnings)


def test_one_file_may_hold_the_certificates_of_both_ends_for_one_key(usual: Shop) -> None:
    for days in (900, 1000):  # whichever of them is valid longest
        server = usual.issue("both", "builds", SERVER, days=days).read_bytes()
        client = usual.issue("both", "builds", CLIENT, days=1900 - days).read_bytes()
        usual.write("both.pem", server, client)
        _, guest = issued(pairs_of(usual, usual.path("builds.pem"), server="both", client="both"))
        assert guest.server_name == "builds.example.com"
        assert guest.identity == "guest.example.com"


@pytest.mark.parametrize("usage", ["codeSigning", None])
@pytest.mark.parametrize("which", ["server", "client"])
def test_a_certificate_for_something_else_is_refused_with_its_file(
    usage: str | None, which: str, usual: Shop
) -> None:
    extended = f"\nextendedKeyUsage={usage}" if usage else ""
    usual.issue("else", "builds", f"{LEAF}{extended}\nsubjectAltName=DNS:else.example.com")
    error = refusal(pairs_of(usual, usual.path("builds.pem"), **{which: "else"}))
    assert error.message.startswith(f"{which}_cert {usual.path('else.pem')}: expected the extended key usage")
    assert f"openssl x509 -in {usual.path('else.pem')} -noout -text" in str(error.hint)


def test_a_ca_is_no_end(usual: Shop) -> None:
    error = refusal(pairs_of(usual, usual.path("builds.pem"), server="policy"))
    assert error.message.startswith(
        f"server_cert {usual.path('policy.pem')}: expected the certificate of one"
    )
    assert error.message.endswith("is a CA")


def test_a_leaf_as_the_ca_is_refused(usual: Shop) -> None:
    error = refusal(pairs_of(usual, usual.path("server.pem")))
    assert error.message.startswith(f"ca_cert {usual.path('server.pem')}: ")
    assert error.message.endswith("is not a CA")


def test_a_pair_of_another_ca_is_refused(usual: Shop, shop: Shop) -> None:
    error = refusal(pairs_of(usual, shop.root("stranger")))
    assert error.message.startswith(f"server_cert {usual.path('server.pem')}: the chain does not reach an")
    assert 'was issued by "CN=builds,O=Operator"' in error.message


def test_an_expired_pair_is_refused_with_its_file(usual: Shop) -> None:
    usual.issue("short", "builds", CLIENT, days=1)
    block = pairs_of(usual, usual.path("builds.pem"), client="short")
    error = refusal(block, clock=later(days=2))
    assert error.message.startswith(f"client_cert {usual.path('short.pem')}: ")
    assert " expired at " in error.message
    assert error.hint == "renew it"


def test_a_pair_that_ends_during_the_build_is_refused(usual: Shop) -> None:
    usual.issue("short", "builds", SERVER, days=1)
    with opened(pairs_of(usual, usual.path("builds.pem"), server="short")) as authority:
        with pytest.raises(MaterialError, match="but the build may need it until"):
            authority.issue_server(build_deadline=utc_now() + timedelta(days=2))
        assert authority.issue_server(build_deadline=utc_now() + timedelta(hours=1))


def test_a_leaf_on_p521_is_refused_because_grpc_refuses_it(usual: Shop) -> None:
    usual.key("p521", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521")
    usual.issue("p521", "builds", CLIENT)
    error = refusal(pairs_of(usual, usual.path("builds.pem"), client="p521"))
    assert error.message.endswith("or an EC key on P-256 or P-384, found EC P-521")


def test_an_extension_that_must_not_be_critical_is_named_before_grpc_refuses_it(usual: Shop) -> None:
    usual.issue("odd", "builds", SERVER.replace("KeyIdentifier=hash", "KeyIdentifier=critical,hash"))
    error = refusal(pairs_of(usual, usual.path("builds.pem"), server="odd"))
    assert error.message.startswith(f"server_cert {usual.path('odd.pem')}: path validation refuses")
    assert error.message.endswith("has the extension 2.5.29.14 as a critical one, which it must not be")


def test_a_name_that_is_there_twice_is_one_name(usual: Shop) -> None:
    again = f"{SERVER},DNS:builds.example.com,DNS:Builds.example.com"
    usual.issue("twice", "builds", again)
    server, _ = issued(pairs_of(usual, usual.path("builds.pem"), server="twice"))
    assert server.server_name == "builds.example.com"


def test_a_leaf_signed_with_sha1_is_refused(usual: Shop) -> None:
    usual.issue("sha1", "builds", SERVER, more=("-sha1",))
    error = refusal(pairs_of(usual, usual.path("builds.pem"), server="sha1"))
    assert error.message.startswith(f"server_cert {usual.path('sha1.pem')}: ")
    assert "is signed with SHA-1, which is not accepted any more (RFC 9155)" in error.message


def test_files_replaced_after_opening_do_not_matter(usual: Shop, shop: Shop) -> None:
    block = pairs_of(usual, usual.path("builds.pem"))
    for setting, path in block.items():
        block[setting] = shop.write(setting, path.read_bytes())
    with opened(block) as authority:
        for path in block.values():
            path.unlink()
        handshake(authority.issue_server(), authority.issue_guest())


def test_a_constraint_above_a_pair_is_named_with_its_file(shop: Shop) -> None:
    shop.root("ca", extensions=f"{CA}\nnameConstraints=critical,permitted;DNS:example.org")
    shop.issue("server", "ca", SERVER)
    shop.issue("client", "ca", CLIENT)
    error = refusal(pairs_of(shop, shop.path("ca.pem")))
    assert error.message.startswith(f"server_cert {shop.path('server.pem')}: path validation refuses")
    assert "name constraints" in error.message
