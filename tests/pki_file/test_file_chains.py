"""Validity and chains: what expired, what is missing, and which of several certificates counts."""

from __future__ import annotations

import shutil
from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest
from cryptography import x509

from firebuild_pki import CAError
from firebuild_pki.chain import extension_of, parse_certificates, read_certificate
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.provider import utc_now
from pki.tools import certificates
from pki_file.finished import issued, pairs_of
from pki_file.operator_files import CA, CLIENT, SERVER, Shop, later, opened

pytestmark = pytest.mark.needs("openssl")


@pytest.fixture
def aging(shop: Shop) -> Shop:
    """A root for three days, a middle CA for two, one below it for one."""
    shop.root("root", days=3)
    shop.issue("middle", by="root", days=2)
    shop.issue("ca", by="middle", days=1)
    shop.write("chain.pem", shop.read("middle.pem", "root.pem"))
    return shop


def refusal(shop: Shop, ahead: dict[str, float], **block: Any) -> CAError:
    given = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key"), **block}
    with pytest.raises(CAError) as caught:
        opened(given, clock=later(**ahead))
    return caught.value


def test_an_expired_ca_is_refused_with_its_file(aging: Shop) -> None:
    error = refusal(aging, {"days": 1.5})
    assert error.message.startswith(f'ca_cert {aging.path("ca.pem")}: "CN=ca,O=Operator" (sha256 ')
    assert " expired at " in error.message
    assert error.hint == "renew it"


def test_a_ca_that_is_not_valid_yet_is_refused_and_clocks_are_doubted(aging: Shop) -> None:
    error = refusal(aging, {"days": -1})
    assert " is not valid before " in error.message
    assert error.hint == "compare the clocks of this machine and of the CA"


def test_an_expired_issuer_in_the_chain_is_refused_with_its_file(aging: Shop) -> None:
    aging.issue("ca", by="middle", days=30)
    error = refusal(aging, {"days": 2.5}, chain=aging.path("chain.pem"))
    assert error.message.startswith(f'chain {aging.path("chain.pem")}: "CN=middle,O=Operator" (sha256 ')
    assert " expired at " in error.message


def test_an_expired_anchor_is_refused_with_its_file(aging: Shop) -> None:
    aging.issue("middle", by="root", days=30)
    aging.issue("ca", by="middle", days=30)
    block = {"chain": aging.path("middle.pem"), "anchors": [aging.path("root.pem")]}
    error = refusal(aging, {"days": 4}, **block)
    assert error.message.startswith(f'anchors {aging.path("root.pem")}: "CN=root,O=Operator" (sha256 ')
    assert " expired at " in error.message


def test_an_expired_anchor_that_is_needed_is_refused_also_beside_others(aging: Shop) -> None:
    aging.issue("ca", by="root", days=30)
    shop = Shop(aging.place)
    shop.root("other", days=30)
    error = refusal(shop, {"days": 4}, anchors=[shop.path("other.pem"), shop.path("root.pem")])
    assert error.message.startswith(f"anchors {aging.path('root.pem')}: ")
    assert " expired at " in error.message


def test_an_expired_anchor_that_is_not_needed_is_left_out(aging: Shop) -> None:
    aging.root("new", days=30)
    anchors = [aging.path("root.pem"), aging.path("new.pem")]
    block = {"ca_cert": aging.path("new.pem"), "ca_key": aging.path("new.key"), "anchors": anchors}
    with opened(block, clock=later(days=4)) as authority:
        (trusted,) = certificates(authority.issue_server().trust_pem)
    assert trusted == certificates(aging.read("new.pem"))[0]


def test_an_expired_stray_in_the_chain_does_no_harm(aging: Shop) -> None:
    aging.root("new", days=30)
    block = {"ca_cert": aging.path("new.pem"), "ca_key": aging.path("new.key")}
    with opened(block, chain=aging.path("ca.pem"), clock=later(days=1.5)) as authority:
        assert authority.issue_server()


def test_of_an_old_and_a_new_issuer_the_valid_one_is_sent(aging: Shop) -> None:
    old = aging.read("middle.pem")
    aging.issue("middle", by="root", days=3)
    aging.issue("ca", by="middle", days=3)
    chain = aging.write("both.pem", old, aging.read("middle.pem", "root.pem"))
    block = {"ca_cert": aging.path("ca.pem"), "ca_key": aging.path("ca.key"), "chain": chain}
    with opened(block, clock=later(days=2.5)) as authority:
        sent = certificates(authority.issue_server().certificate_chain_pem)
    assert sent[2] == certificates(aging.read("middle.pem"))[0]


@pytest.mark.parametrize("setting", ["chain", "anchors"])
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_editions_of_a_root_the_one_that_covers_the_build_is_trusted(
    setting: str, order: int, shop: Shop
) -> None:
    shop.root("root", days=2)
    ending = shop.read("root.pem")
    shop.root("root", days=30)
    shop.issue("ca", by="root", days=30)
    lasting = shop.read("root.pem")
    both = shop.write("both.pem", *[ending, lasting][::order])
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key"), "leaf_lifetime": "200h"}
    more: dict[str, Any] = {setting: [both] if setting == "anchors" else both}
    with opened(block, **more) as authority:
        deadline = authority.issue_server().not_before + timedelta(days=5)
        (trusted,) = certificates(authority.issue_server(build_deadline=deadline).trust_pem)
        assert trusted == certificates(lasting)[0]
        assert authority.warnings == ()


def test_a_missing_issuer_is_named(aging: Shop) -> None:
    error = refusal(aging, {}, anchors=[aging.path("root.pem")])
    assert error.message.startswith(
        f'ca_cert {aging.path("ca.pem")}: the chain does not reach an anchor: "CN=ca,O=Operator" (sha256 '
    )
    assert 'was issued by "CN=middle,O=Operator", which is neither in ca_cert nor in chain' in error.message
    assert error.message.endswith(f"in anchors {aging.path('root.pem')}")
    assert "add the certificate of that issuer to chain" in str(error.hint)


def test_a_missing_issuer_further_up_is_named(aging: Shop) -> None:
    aging.root("other")
    block = {"chain": aging.path("middle.pem"), "anchors": [aging.path("other.pem")]}
    error = refusal(aging, {}, **block)
    assert '"CN=middle,O=Operator" (sha256 ' in error.message
    assert 'was issued by "CN=root,O=Operator", which is neither' in error.message


def test_a_root_of_the_same_name_with_another_key_does_not_count(aging: Shop, shop: Shop) -> None:
    other = Shop(aging.path("elsewhere"))
    other.place.mkdir()
    other.root("root")
    chain = aging.write("chain.pem", aging.read("middle.pem"), other.read("root.pem"))
    error = refusal(aging, {}, chain=chain)
    assert 'was issued by "CN=root,O=Operator", which is neither' in error.message


def test_a_cross_signed_ca_leads_to_either_root(shop: Shop) -> None:
    shop.root("old")
    shop.root("new")
    shop.issue("ca", by="old")
    by_old = shop.read("ca.pem")
    shop.issue("ca", by="new")
    both = shop.write("ca-both.pem", by_old, shop.read("ca.pem"))
    for root in ("old", "new"):
        block = {"ca_cert": both, "ca_key": shop.path("ca.key")}
        with opened(block, anchors=[shop.path(f"{root}.pem")]) as authority:
            (trusted,) = certificates(authority.issue_server().trust_pem)
        assert trusted == certificates(shop.read(f"{root}.pem"))[0]


def test_an_issuer_that_is_cross_signed_leads_to_either_root(shop: Shop) -> None:
    shop.root("old")
    shop.root("new")
    shop.issue("middle", by="old")
    by_old = shop.read("middle.pem")
    shop.issue("middle", by="new")
    chain = shop.write("chain.pem", by_old, shop.read("middle.pem"))
    shop.issue("ca", by="middle")
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key"), "chain": chain}
    for root in ("old", "new"):
        with opened(block, anchors=[shop.path(f"{root}.pem")]) as authority:
            server, guest = authority.issue_server(), authority.issue_guest()
        handshake(server, guest)
        assert certificates(server.trust_pem) == certificates(shop.read(f"{root}.pem"))


def test_cas_that_all_sign_each_other_are_no_labyrinth(shop: Shop) -> None:
    names = [f"bridge-{number}" for number in range(6)]
    parts = []
    for name in names:
        shop.root(name)
    for name, by in permutations(names, 2):
        shop.root(by)  # its own certificate again: `issue` has replaced it
        shop.issue(name, by=by)
        parts.append(shop.read(f"{name}.pem"))
    shop.issue("ca", by=names[0])
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key")}
    chain = shop.write("chain.pem", *parts)
    shop.root("elsewhere")
    with pytest.raises(CAError, match="the chain does not reach an anchor"):
        opened(block, chain=chain, anchors=[shop.path("elsewhere.pem")])


def test_an_issuer_signed_with_sha1_is_named_with_the_way_out(aging: Shop) -> None:
    aging.issue("middle", by="root", more=("-sha1",))
    aging.issue("ca", by="middle")
    shutil.copy(aging.path("middle.pem"), aging.path("chain.pem"))
    block = {"chain": aging.path("chain.pem")}
    error = refusal(aging, {}, **block, anchors=[aging.path("root.pem")])
    assert '"CN=middle,O=Operator" (sha256 ' in error.message
    assert "is signed with SHA-1, which is not accepted any more (RFC 9155)" in error.message
    # and the way out that the hint names
    given = {"ca_cert": aging.path("ca.pem"), "ca_key": aging.path("ca.key")}
    with opened(given, anchors=[aging.path("middle.pem")]) as authority:
        assert authority.issue_server()


def test_a_ca_with_a_key_that_tls_refuses_is_named_before_anything_is_signed(shop: Shop) -> None:
    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:explicit")
    shop.key("ca", *curve)
    shop.root("ca")
    words = '"CN=ca,O=Operator" (sha256 '
    reason = "spells out the parameters of its elliptic curve"
    error = refusal(shop, {})
    assert words in error.message
    assert reason in error.message
    assert "have it reissued" in str(error.hint)
    shop.issue("lower", by="ca")
    block = {"ca_cert": shop.path("lower.pem"), "ca_key": shop.path("lower.key")}
    above = refusal(shop, {}, **block, anchors=[shop.path("ca.pem")])
    assert words in above.message
    assert f"{shop.path('ca.pem')}" in above.message
    assert reason in above.message


def test_a_self_issued_certificate_is_not_taken_for_a_root(shop: Shop) -> None:
    # RFC 4210 section 4.4: the new key of a root, signed with the old one under the same name
    shop.root("old", subject="/O=Operator/CN=root")
    shop.issue("new", by="old", subject="/O=Operator/CN=root")
    chain = shop.path("old.pem")
    with opened(ca_cert=shop.path("new.pem"), ca_key=shop.path("new.key"), chain=chain) as authority:
        server = authority.issue_server()
    assert certificates(server.trust_pem) == certificates(shop.read("old.pem"))
    assert len(certificates(server.certificate_chain_pem)) == 2


def test_a_self_issued_certificate_with_sha1_is_not_taken_for_a_root(shop: Shop) -> None:
    shop.root("old", subject="/O=Operator/CN=root")
    shop.issue("new", by="old", subject="/O=Operator/CN=root", more=("-sha1",))
    shop.issue("ca", by="new")
    chain = shop.write("chain.pem", shop.read("new.pem", "old.pem"))
    error = refusal(shop, {}, chain=chain)
    assert "is signed with SHA-1, which is not accepted any more" in error.message


def test_the_deadline_is_held_against_the_ca(aging: Shop) -> None:
    block = {"ca_cert": aging.path("ca.pem"), "ca_key": aging.path("ca.key")}
    refused = pytest.raises(CAError, match="but the build may need it until")
    with opened(block) as authority, refused:
        authority.issue_guest(build_deadline=utc_now() + timedelta(days=1.5))


ELSEWHERE = f"{CA}\nauthorityKeyIdentifier=keyid\nnameConstraints=critical,permitted;DNS:elsewhere.example"


@pytest.fixture
def crossed(shop: Shop) -> Shop:
    """A CA that two roots signed; what it has of the first, which lasts longer, does not permit our names."""
    shop.root("strict")
    shop.root("free")
    shop.issue("ca", by="strict", extensions=ELSEWHERE, days=900)
    shop.write("by-strict.pem", shop.read("ca.pem"))
    shop.issue("ca", by="free", days=800)
    shop.write("both.pem", shop.read("by-strict.pem", "ca.pem"))
    shop.write("roots.pem", shop.read("strict.pem", "free.pem"))
    return shop


@pytest.mark.parametrize("more", [{"chain": "roots.pem"}, {"anchors": ["roots.pem"]}, {}], ids=str)
def test_of_a_cross_signed_ca_the_edition_that_permits_the_names_signs(
    more: dict[str, Any], crossed: Shop
) -> None:
    block = {"ca_cert": crossed.path("both.pem"), "ca_key": crossed.path("ca.key")}
    named: dict[str, Any] = {
        key: [crossed.path(one) for one in value] if isinstance(value, list) else crossed.path(value)
        for key, value in more.items()
    }
    with opened(block, **named) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    handshake(server, guest)
    if "chain" in more:
        assert certificates(server.trust_pem) == certificates(crossed.read("free.pem"))


def test_of_a_cross_signed_issuer_the_edition_that_permits_the_names_is_sent(crossed: Shop) -> None:
    crossed.issue("builds", by="ca")
    block = {"ca_cert": crossed.path("builds.pem"), "ca_key": crossed.path("builds.key")}
    both = crossed.write("chain.pem", crossed.read("both.pem", "roots.pem"))
    with opened(block, chain=both) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    handshake(server, guest)
    assert certificates(server.certificate_chain_pem)[2:] == certificates(crossed.read("ca.pem"))


def test_where_no_edition_permits_the_names_the_longest_is_complained_about(crossed: Shop) -> None:
    crossed.issue("ca", by="free", extensions=ELSEWHERE, days=800)
    both = crossed.write("both.pem", crossed.read("ca.pem", "by-strict.pem"))
    block = {"ca_cert": both, "ca_key": crossed.path("ca.key"), "anchors": [crossed.path("roots.pem")]}
    words = r"the name constraints of .* do not permit the name"
    with opened(block) as authority, pytest.raises(CAError, match=words):
        authority.issue_server()


def test_finished_certificates_take_the_edition_that_permits_their_names(crossed: Shop) -> None:
    for end, extensions in (("server", SERVER), ("client", CLIENT)):
        crossed.issue(end, by="ca", extensions=extensions)
    trusted = crossed.write("trust.pem", crossed.read("both.pem", "roots.pem"))
    issued(pairs_of(crossed, trusted))


@pytest.mark.parametrize("written", ["/O=operator/CN=ROOT", "/O=Operator/CN=root  "])
def test_a_name_that_is_written_in_another_way_is_told_from_one_that_is_missing(
    written: str, shop: Shop
) -> None:
    shop.root("root")
    right = shop.read("root.pem")
    shop.root("root", subject=written)
    shop.issue("ca", by="root")
    shop.write("root.pem", right)
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key"), "chain": shop.path("root.pem")}
    with pytest.raises(CAError, match="its issuer's name is written in another way there") as caught:
        opened(block)
    assert "the very subject of its issuer" in str(caught.value.hint)


@pytest.mark.filterwarnings("error")
def test_numbers_that_no_certificate_may_have_are_not_remarked_on_stderr(shop: Shop) -> None:
    shop.root("root", more=("-set_serial", "0"))
    shop.issue("ca", by="root", extensions=f"{CA}\nauthorityKeyIdentifier=keyid,issuer:always")
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key")}
    with opened(block, anchors=[shop.path("root.pem")]) as authority:
        handshake(authority.issue_server(), authority.issue_guest())
    pem = shop.read("ca.pem")
    for read in (read_certificate(pem), *parse_certificates(pem, "it")):
        assert extension_of(read, x509.AuthorityKeyIdentifier) is not None


def test_an_issuer_that_is_there_but_not_for_its_identifiers_is_not_called_missing(shop: Shop) -> None:
    shop.root("root")
    shop.issue("ca", "root")
    shop.root("root", extensions=CA.replace("=hash", "=0102030405"))  # renewed, with another identifier
    error = refusal(
        shop, {}, ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key"), chain=shop.path("root.pem")
    )
    assert error.message.startswith(f'ca_cert {shop.path("ca.pem")}: "CN=ca,O=Operator" (sha256 ')
    assert ' does not lead to "CN=root,O=Operator" (sha256 ' in error.message
    assert error.message.endswith("but the subject key identifier of the issuer is 01:02:03:04:05")
    assert error.hint == "have it reissued: TLS libraries take the two for unrelated"
