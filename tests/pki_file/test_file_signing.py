"""An operator's CA signs: every shape it comes in ends in a real gRPC handshake."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from firebuild_pki import (
    Authority,
    AuthorityClosed,
    CAError,
    CAProvider,
    Profile,
    ProviderContext,
    SignedCertificate,
    SignRequest,
    UnsupportedOperation,
    open_authority,
)
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keys import generate_key
from firebuild_pki.provider import utc_now
from firebuild_pki.providers.file.provider import SigningCA
from firebuild_pki.x509 import make_csr
from pki.tools import ca_settings, certificates, leaf_of
from pki_file.operator_files import CA, Shop, later, opened, settings_of

pytestmark = pytest.mark.needs("openssl")


def talk(authority: Authority) -> tuple[list[str], list[str]]:
    """Issue for both ends, let them talk; subjects of the server's chain and of what is trusted."""
    server, guest = authority.issue_server(), authority.issue_guest()
    seen = handshake(server, guest)
    assert seen.guest_names == ("guest.b.firebuild.internal",)
    assert seen.guest_fingerprint_sha256 == guest.fingerprint_sha256
    return common_names(server.certificate_chain_pem), common_names(server.trust_pem)


def common_names(pem: bytes) -> list[str]:
    return [one.subject.rfc4514_string().split(",")[0].removeprefix("CN=") for one in certificates(pem)]


LEAF = "b.firebuild.internal"

SHAPES: dict[str, tuple[str, list[str], list[str]]] = {
    # ca_cert | chain | anchors | key -> chain that is sent, what is trusted
    "a root": ("root.pem|||root.key", [LEAF], ["root"]),
    "an intermediate whose root is offline": ("builds.pem|||builds.key", [LEAF], ["builds"]),
    "a chain in order": (
        "builds.pem|policy.pem root.pem||builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "a chain in reverse": (
        "builds.pem|root.pem policy.pem||builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "all in one file, any order": (
        "policy.pem root.pem builds.pem|||builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "everything twice": (
        "builds.pem builds.pem|policy.pem root.pem policy.pem builds.pem||builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "leaves and keys in the chain": (
        "builds.pem|server.pem server.key policy.pem root.pem||builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "the root as an anchor": (
        "builds.pem|policy.pem|root.pem|builds.key",
        [LEAF, "builds", "policy"],
        ["root"],
    ),
    "an intermediate as an anchor": (
        "builds.pem|root.pem|policy.pem|builds.key",
        [LEAF, "builds"],
        ["policy"],
    ),
    "the CA itself as an anchor": (
        "builds.pem|root.pem policy.pem|builds.pem|builds.key",
        [LEAF],
        ["builds"],
    ),
    "the chain without its root": ("builds.pem|policy.pem||builds.key", [LEAF], ["builds"]),
    "certificate and key in one file": ("root.pem root.key|||root.pem root.key", [LEAF], ["root"]),
    "a file name with spaces": ("root.pem|||root key", [LEAF], ["root"]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_ca_signs_and_both_ends_talk(shape: str, usual: Shop, shop: Shop) -> None:
    written, sent, trusted = SHAPES[shape]
    with opened(**block_of(written, usual, shop)) as authority:
        assert talk(authority) == (sent, trusted)
        assert authority.warnings == ()
        authority.check()


def block_of(written: str, usual: Shop, shop: Shop) -> dict[str, Any]:
    shop.write("root key", usual.read("root.key"))
    block: dict[str, Any] = {}
    for setting, names in zip(("ca_cert", "chain", "anchors", "ca_key"), written.split("|"), strict=True):
        if not names:
            continue
        if names == "root key":
            block[setting] = shop.path("root key")
            continue
        data = [usual.read(name) for name in names.split()]
        block[setting] = shop.write(f"{setting}.pem", *data)
    if "anchors" in block:
        block["anchors"] = [block["anchors"]]
    return block


def test_several_anchors_are_trusted_together(usual: Shop, shop: Shop) -> None:
    other = shop.root("other")
    anchors = [other, usual.path("root.pem")]
    ca = {"ca_cert": usual.path("policy.pem"), "ca_key": usual.path("policy.key")}
    with opened(ca, anchors=anchors) as authority:
        assert talk(authority) == ([LEAF, "policy"], ["other", "root"])


def test_a_stray_root_in_the_chain_is_not_trusted(usual: Shop, shop: Shop) -> None:
    shop.root("stray")
    bundle = shop.write("bundle.pem", shop.read("stray.pem"), usual.read("policy.pem", "root.pem"))
    with opened(ca_cert=usual.path("builds.pem"), ca_key=usual.path("builds.key"), chain=bundle) as authority:
        assert talk(authority) == ([LEAF, "builds", "policy"], ["root"])


def test_of_a_renewed_ca_the_certificate_that_is_valid_longest_signs(shop: Shop) -> None:
    shop.root("ca", days=10)
    old = shop.read("ca.pem")
    shop.root("ca", days=1000)
    both = shop.write("both.pem", old, shop.read("ca.pem"))
    with opened(ca_cert=both, ca_key=shop.path("ca.key")) as authority:
        (anchor,) = certificates(authority.issue_server().trust_pem)
    assert anchor == certificates(shop.read("ca.pem"))[0]


OLD = {
    "SHA-1 signature": ("-sha1",),
    "MD5 signature": ("-md5",),
}


@pytest.mark.parametrize("flaw", OLD)
@pytest.mark.parametrize("below", [False, True])
def test_a_root_from_long_ago_still_does(flaw: str, below: bool, shop: Shop) -> None:
    # no key usage, no identifiers, an RSA key, and a signature that nobody may check any more
    shop.key("old", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    shop.root("old", extensions="basicConstraints=CA:TRUE\nsubjectKeyIdentifier=none", more=OLD[flaw])
    block = {"ca_cert": shop.path("old.pem"), "ca_key": shop.path("old.key")}
    if below:
        shop.issue("new", by="old", extensions=CA)
        block = {"ca_cert": shop.path("new.pem"), "ca_key": shop.path("new.key"), "chain": block["ca_cert"]}
    with opened(block) as authority:
        assert talk(authority) == ([LEAF, *["new"][: below or 0]], ["old"])
        assert "strict TLS libraries may refuse the chain" in " ".join(authority.warnings)


@pytest.mark.filterwarnings("ignore:Parsed a serial number:UserWarning:firebuild_pki.chain")
def test_a_root_with_the_serial_number_zero_still_does(shop: Shop) -> None:
    shop.root("zero", more=("-set_serial", "0"))
    with opened(ca_cert=shop.path("zero.pem"), ca_key=shop.path("zero.key")) as authority:
        assert handshake(authority.issue_server(), authority.issue_guest())


def test_a_ca_on_p521_signs_with_sha384(shop: Shop) -> None:
    shop.key("ca", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521")
    shop.root("ca")
    with opened(ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key")) as authority:
        talk(authority)
        algorithm = leaf_of(authority.issue_server()).signature_hash_algorithm
        assert algorithm is not None
        assert algorithm.name == "sha384"


def test_lifetime_and_backdate_are_those_of_the_settings(usual: Shop) -> None:
    ca = {"ca_cert": usual.path("root.pem"), "ca_key": usual.path("root.key")}
    with opened(ca, leaf_lifetime="10m", backdate="0s") as authority:
        leaf = leaf_of(authority.issue_server())
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(minutes=10)
        assert any("the CA capped the lifetime" in text for text in authority.warnings)


def test_a_backdate_before_all_certificates_begins_with_the_first(usual: Shop) -> None:
    block = {"ca_cert": usual.path("root.pem"), "ca_key": usual.path("root.key"), "backdate": "876000h"}
    ca = certificates(usual.read("root.pem"))[0]
    with opened(block) as authority:
        leaf = certificates(authority.issue_server().certificate_chain_pem)[0]
    assert leaf.not_valid_before_utc == ca.not_valid_before_utc
    with open_authority(ca_settings({"embedded": {"backdate": "876000h"}}), build_id="b") as authority:
        assert certificates(authority.issue_server().trust_pem)[0].not_valid_before_utc.year == 1950


def test_a_leaf_ends_with_its_ca_and_the_reason_is_named(shop: Shop) -> None:
    shop.root("ca", days=1)
    ca = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key")}
    with opened(ca, clock=later(hours=23.5)) as authority:
        leaf = leaf_of(authority.issue_server())
        assert leaf.not_valid_after_utc == certificates(shop.read("ca.pem"))[0].not_valid_after_utc
        assert any(f"in ca_cert {shop.path('ca.pem')} expires at" in text for text in authority.warnings)


def test_a_ca_that_ends_during_the_build_is_refused(shop: Shop) -> None:
    shop.root("ca", days=1)
    clock = later(hours=23.5)
    ca = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key")}
    refused = pytest.raises(CAError, match="but the build may need it until")
    with opened(ca, clock=clock) as authority, refused:
        authority.issue_server(build_deadline=clock() + timedelta(hours=1))


def test_a_ca_that_expires_while_it_is_open_signs_nothing_more(shop: Shop) -> None:
    shop.root("ca", days=1)
    now = [utc_now()]
    ca = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key")}
    with opened(ca, clock=lambda: now[0]) as authority:
        authority.issue_server()
        now[0] += timedelta(days=3)
        with pytest.raises(CAError, match=rf"ca_cert {shop.path('ca.pem')}: .* expired at"):
            authority.issue_server()


def test_files_replaced_after_opening_do_not_matter(usual: Shop, shop: Shop) -> None:
    cert = shop.write("ca.pem", usual.read("root.pem"))
    key = shop.write("ca.key", usual.read("root.key"))
    with opened(ca_cert=cert, ca_key=key) as authority:
        cert.write_text("gone")
        key.unlink()
        assert talk(authority) == ([LEAF], ["root"])
        authority.check()


def test_names_below_another_suffix_are_signed_too(usual: Shop, shop: Shop) -> None:
    block = {"ca_cert": str(usual.path("root.pem")), "ca_key": str(usual.path("root.key"))}
    with open_authority(settings_of(block, name_suffix="example.org"), build_id="b") as authority:
        assert authority.issue_guest().identity == "guest.b.example.org"


CONSTRAINTS = {
    "name constraints": ("nameConstraints=critical,permitted;DNS:example.com", "name constraints"),
    "extended key usage": ("extendedKeyUsage=serverAuth", "forbids this kind of leaf"),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_constraints_of_the_ca_are_named_with_its_file(constraint: str, shop: Shop) -> None:
    extension, reason = CONSTRAINTS[constraint]
    cert = shop.root("ca", extensions=f"{CA}\n{extension}")
    with opened(ca_cert=cert, ca_key=shop.path("ca.key")) as authority:
        with pytest.raises(CAError, match=rf"ca-provider\(file\): ca_cert {cert}: .*{reason}") as caught:
            authority.issue_guest()
        assert f"openssl x509 -in {cert} -noout -text" in str(caught.value.hint)
        assert "ca.name_suffix" in str(caught.value.hint)


@pytest.mark.parametrize("trusted", [[], ["ca.pem"]], ids=["root", "ca"])
def test_below_a_ca_that_permits_certain_subjects_certificates_have_none(
    trusted: list[str], shop: Shop
) -> None:
    restricted = f"{CA}\nnameConstraints=critical,permitted;dirName:dn,permitted;DNS:firebuild.internal"
    shop.root("root", extensions=CA)
    shop.issue("ca", by="root", extensions=f"{restricted}\n[dn]\nO=Operator")
    block = {"ca_cert": shop.path("ca.pem"), "ca_key": shop.path("ca.key"), "chain": shop.path("root.pem")}
    with opened(block, anchors=[shop.path(one) for one in trusted]) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        assert handshake(server, guest).server_name == "b.firebuild.internal"
        assert authority.warnings == ()
    assert not certificates(server.certificate_chain_pem)[0].subject.rdns


@pytest.mark.parametrize("domain", [".firebuild.internal", "firebuild.internal", ".internal"])
def test_name_constraints_with_and_without_a_leading_dot_are_understood(domain: str, shop: Shop) -> None:
    cert = shop.root("ca", extensions=f"{CA}\nnameConstraints=critical,permitted;DNS:{domain}")
    with opened(ca_cert=cert, ca_key=shop.path("ca.key")) as authority:
        assert talk(authority) == ([LEAF], ["ca"])
        assert authority.warnings == ()


def test_a_ca_without_a_name_is_refused_in_whole_sentences(shop: Shop) -> None:
    cert = shop.root("nobody", subject="/")
    with (
        opened(ca_cert=cert, ca_key=shop.path("nobody.key")) as authority,
        pytest.raises(
            CAError, match=r"path validation refuses .*: certificate must have a non-empty Issuer "
        ),
    ):
        authority.issue_guest()


def test_a_path_length_that_forbids_the_ca_is_named(shop: Shop) -> None:
    shop.root("root", extensions=CA.replace("CA:TRUE", "CA:TRUE,pathlen:0"))
    cert = shop.issue("sub", by="root")
    block = {"ca_cert": cert, "ca_key": shop.path("sub.key")}
    refused = pytest.raises(CAError, match=r'the path length of "CN=root,O=Operator" .* allows 0 CAs below')
    with opened(block, anchors=[shop.path("root.pem")]) as authority, refused:
        authority.issue_server()
    with opened(block) as authority:
        assert talk(authority) == ([LEAF], ["sub"])


NAMES = ("b.firebuild.internal",)
REQUEST = SignRequest(make_csr(generate_key(), NAMES), Profile.SERVER, NAMES, timedelta(hours=1), "b")


def provider_of(block: dict[str, str]) -> CAProvider:
    settings = settings_of(block)
    return settings.spec.factory(settings.provider_settings, ProviderContext(utc_now, {}))


def test_a_closed_provider_has_no_keys_and_can_be_opened_again(usual: Shop) -> None:
    provider = provider_of({"ca_cert": str(usual.path("root.pem")), "ca_key": str(usual.path("root.key"))})
    for _ in range(2):
        for call in (provider.trust_bundle, provider.check, lambda: provider.sign(REQUEST)):
            with pytest.raises(AuthorityClosed, match="the provider is not open"):
                call()
        provider.open()
        assert isinstance(provider.sign(REQUEST), SignedCertificate)
        assert [one for one in vars(provider).values() if isinstance(one, SigningCA)]
        provider.close()
        provider.close()
        assert not [one for one in vars(provider).values() if isinstance(one, SigningCA)]


def test_a_ca_has_no_pairs(usual: Shop) -> None:
    provider = provider_of({"ca_cert": str(usual.path("root.pem")), "ca_key": str(usual.path("root.key"))})
    with pytest.raises(UnsupportedOperation):
        provider.ready_pair(Profile.SERVER)
