"""Certificates from real servers."""

from __future__ import annotations

import json
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from firebuild_pki import (
    CAError,
    MaterialError,
    NoteLevel,
    Profile,
    TLSMaterial,
    TrustBundle,
    load_provider,
    open_authority,
)

from cfssl_servers import KEY, LABEL, Pki, bare, now, opened, section, serving

pytestmark = pytest.mark.needs("cfssl")


def certificates(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


def subjects(pem: bytes) -> list[str]:
    return [one.subject.rfc4514_string() for one in certificates(pem)]


def usages(material: TLSMaterial) -> list[x509.ObjectIdentifier]:
    leaf = certificates(material.certificate_chain_pem)[0]
    return list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_the_provider_is_found_through_its_entry_point() -> None:
    (entry,) = entry_points(group="firebuild_pki.providers", name="cfssl")
    assert entry.value == "firebuild_pki_cfssl"
    assert load_provider("cfssl").name == "cfssl"


def test_the_key_may_be_in_a_file(server: str, tmp_path: Path) -> None:
    path = tmp_path / "auth-key"
    path.write_text(f"{KEY}\n")
    with open_authority(section(server, auth_key={"file": str(path)}), build_id="b1") as authority:
        assert authority.issue_server().server_name == "b1.firebuild.internal"


def test_without_anchors_the_signing_ca_is_trusted(server: str) -> None:
    with opened(server) as authority:
        assert subjects(authority.trust_pem) == ["CN=Example ca"]
        material = authority.issue_server()
        assert subjects(material.certificate_chain_pem) == ["CN=b1.firebuild.internal"]
        assert authority.warnings == ()


def test_with_anchors_the_signing_ca_is_sent_along(server: str, pki: Pki) -> None:
    with opened(server, anchors=pki.root) as authority:
        assert subjects(authority.trust_pem) == ["CN=Example root"]
        material = authority.issue_guest()
        assert subjects(material.certificate_chain_pem) == ["CN=guest.b1.firebuild.internal", "CN=Example ca"]
        assert authority.warnings == ()


def test_the_signing_ca_among_the_anchors_is_not_sent_along(server: str, pki: Pki, tmp_path: Path) -> None:
    anchors = tmp_path / "anchors.pem"
    anchors.write_bytes(pki.root.read_bytes() + pki.ca.read_bytes())
    with opened(server, anchors=anchors) as authority:
        assert len(certificates(authority.issue_server().certificate_chain_pem)) == 1
        assert authority.warnings == ()
    provider = bare(server, anchors=anchors)
    provider.open()
    assert provider.trust_bundle() == TrustBundle(anchors.read_bytes())


def test_each_end_gets_its_own_usage(server: str) -> None:
    with opened(server) as authority:
        assert usages(authority.issue_server()) == [ExtendedKeyUsageOID.SERVER_AUTH]
        assert usages(authority.issue_guest()) == [ExtendedKeyUsageOID.CLIENT_AUTH]


@pytest.mark.parametrize("key_type", ["p256", "p384", "rsa2048"])
def test_the_kind_of_key_is_up_to_us(server: str, key_type: str) -> None:
    settings = {**section(server), "key_type": key_type}
    with open_authority(settings, environ={"CFSSL_KEY": KEY}) as authority:
        authority.issue_server()
        assert authority.warnings == ()


def test_a_name_too_long_for_a_common_name_leaves_the_subject_empty(server: str) -> None:
    build_id = "b" * 63
    environ = {"CFSSL_KEY": KEY}
    with open_authority(section(server), build_id=build_id, environ=environ) as authority:
        assert subjects(authority.issue_guest().certificate_chain_pem) == [""]
        assert authority.warnings == ()


def test_the_lifetime_is_that_of_the_profile(server: str) -> None:
    with opened(server, server_profile="long") as authority:
        material = authority.issue_server(ttl=timedelta(minutes=10))
        assert timedelta(hours=719) < material.not_after - now() <= timedelta(hours=720)
        (warning,) = authority.warnings
        assert warning.startswith("the CA extended the lifetime of the server certificate")


def test_a_profile_too_short_for_the_build_is_an_error(server: str) -> None:
    with opened(server) as authority, pytest.raises(MaterialError, match="the build may need it until"):
        authority.issue_server(build_deadline=now() + timedelta(hours=2))


def test_a_profile_for_both_ends_is_a_warning_of_the_framework(server: str) -> None:
    with opened(server, server_profile="both") as authority:
        authority.issue_server()
        assert any(text.endswith("found: clientAuth, serverAuth") for text in authority.warnings)


def test_a_profile_that_does_not_exist_is_refused_by_the_framework(server: str) -> None:
    with opened(server, server_profile="typo") as authority, pytest.raises(MaterialError) as caught:
        authority.issue_server()
    assert "expected the extended key usage serverAuth" in str(caught.value)
    assert "found: none" in str(caught.value)


def test_a_label_chooses_the_ca_of_a_multirootca(multiroot_server: str, pki: Pki) -> None:
    with opened(multiroot_server, label=LABEL, anchors=pki.root) as authority:
        authority.issue_server()
        authority.issue_guest()
        assert authority.warnings == ()


def test_a_multirootca_may_have_a_default_label(multiroot_tls_server: str, pki: Pki) -> None:
    with opened(f"https://{multiroot_tls_server}", ca_file=pki.root) as authority:
        authority.issue_server()
        assert authority.warnings == ()


def test_the_configuration_in_the_readme_is_all_that_is_needed(pki: Pki, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    config = json.loads(readme.split("```json\n")[1].split("```")[0])
    config["auth_keys"]["firebuild"]["key"] = KEY
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with serving(pki, config=path) as address:
        with opened(address) as authority:
            ttl = timedelta(minutes=41)  # what a build asks for, unless configured otherwise
            authority.issue_server(ttl=ttl), authority.issue_guest(ttl=ttl)
            assert [note for note in authority.check() if note.level is not NoteLevel.OK] == []
            assert authority.warnings == ()
        other = opened(address, server_profile="firebuild-guest", guest_profile="x")
        with other, pytest.raises(CAError, match="name_whitelist"):
            other.issue_server()


SPIFFE = "spiffe://example.org/build/agent"


def test_a_peer_has_both_usages(server: str) -> None:
    with opened(server, peer_profile="both") as authority:
        material = authority.issue(Profile.PEER, "db.example")
        client = authority.issue(Profile.CLIENT, ["a.example", "b.example"])
        assert authority.warnings == ()
    assert set(usages(material)) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert usages(client) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert client.names == ("a.example", "b.example")


def test_a_spiffe_id_is_a_uri_or_the_old_server_is_named(server: str) -> None:
    with opened(server, peer_profile="both") as authority:
        try:
            (leaf, *_) = certificates(
                authority.issue(Profile.PEER, ["db.example", SPIFFE]).certificate_chain_pem
            )
        except CAError as error:  # cfssl 1.2, as distributions have it
            assert "take a newer one (1.6 does)" in str(error)  # noqa: PT017 - either is right
            assert f"wrote the URI {SPIFFE} into the certificate as a DNS name" in str(error)  # noqa: PT017
            return
    found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.UniformResourceIdentifier) == [SPIFFE]


def test_without_a_profile_for_peers_none_is_issued(server: str) -> None:
    with (
        opened(server) as authority,
        pytest.raises(CAError, match="set peer_profile to one with both usages"),
    ):
        authority.issue(Profile.PEER, SPIFFE)
