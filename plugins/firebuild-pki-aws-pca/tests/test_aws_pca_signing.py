"""Certificates, and with which credentials, templates and lifetimes they are asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from firebuild_pki import (
    CAError,
    NoteLevel,
    Profile,
    RetryAfter,
    SignedCertificate,
    SignRequest,
    TLSMaterial,
    load_provider,
)
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import Validity, make_csr, make_leaf, make_root, to_pem

from firebuild_pki_aws_pca import AwsPcaProvider
from pca_server import BUILDS
from pca_servers import MISSING, TEMPLATE, Server, now, serving

ROLE = "arn:aws:iam::123456789012:role/builds"


def subjects(pem: bytes) -> list[str]:
    return [one.subject.rfc4514_string() for one in x509.load_pem_x509_certificates(pem)]


def leaf_of(material: TLSMaterial) -> x509.Certificate:
    return x509.load_pem_x509_certificates(material.certificate_chain_pem)[0]


def asked(server: Server) -> dict[str, Any]:
    """The parameters of the only IssueCertificate."""
    (found,) = [parameters for operation, parameters in server.calls() if operation == "IssueCertificate"]
    return found


def request(ttl: timedelta) -> SignRequest:
    names = ("b1.firebuild.internal",)
    return SignRequest(make_csr(generate_key(), names), Profile.SERVER, names, ttl, "b1")


def signed(provider: AwsPcaProvider, wanted: SignRequest) -> SignedCertificate:
    """Have a request signed at once."""
    answer = provider.sign(wanted)
    assert isinstance(answer, SignedCertificate)
    return answer


def test_the_provider_is_found_through_its_entry_point() -> None:
    (entry,) = entry_points(group="firebuild_pki.providers", name="aws-pca")
    assert entry.value == "firebuild_pki_aws_pca"
    assert load_provider("aws-pca").name == "aws-pca"


def test_a_root_ca_is_the_anchor(server: Server, root: str) -> None:
    with server.opened(root) as authority:
        assert subjects(authority.trust_pem) == ["CN=Builds root"]
        assert subjects(authority.issue_server().certificate_chain_pem) == ["CN=b1.firebuild.internal"]
        assert authority.warnings == ()
    assert asked(server)["SigningAlgorithm"] == "SHA256WITHECDSA"


def test_below_a_root_the_ca_is_sent_along(server: Server, subordinate: str) -> None:
    with server.opened(subordinate) as authority:
        assert subjects(authority.trust_pem) == ["CN=Example root"]
        material = authority.issue_guest()
        assert subjects(material.certificate_chain_pem) == ["CN=guest.b1.firebuild.internal", "CN=Builds CA"]
        assert authority.warnings == ()
    found = asked(server)
    assert found["SigningAlgorithm"] == "SHA256WITHRSA"
    assert found["TemplateArn"] == f"{TEMPLATE}EndEntityClientAuthCertificate/V1"
    assert "ApiPassthrough" not in found


def test_a_certificate_begins_five_minutes_ago(server: Server, root: str) -> None:
    with server.opened(root) as authority:
        before = now()
        leaf = leaf_of(authority.issue_server())
    begin = leaf.not_valid_before_utc
    assert timedelta(minutes=-6) < begin - before < timedelta(minutes=-4)


def test_blank_templates_get_the_usages_with_the_call(server: Server, root: str) -> None:
    blank = "BlankEndEntityCertificate_APICSRPassthrough/V1"
    with server.opened(root, server_template=blank, guest_template=TEMPLATE + blank) as authority:
        server_leaf, guest_leaf = leaf_of(authority.issue_server()), leaf_of(authority.issue_guest())
        assert authority.warnings == ()
    for leaf, usage in (
        (server_leaf, ExtendedKeyUsageOID.SERVER_AUTH),
        (guest_leaf, ExtendedKeyUsageOID.CLIENT_AUTH),
    ):
        assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_encipherment


def test_the_algorithm_can_be_chosen_and_has_to_fit(server: Server, root: str) -> None:
    with server.opened(root, signing_algorithm="SHA384WITHECDSA") as authority:
        found = leaf_of(authority.issue_server()).signature_hash_algorithm
        assert found is not None
        assert found.name == "sha384"
    with (
        server.opened(root, signing_algorithm="SHA256WITHRSA") as authority,
        pytest.raises(CAError, match="AWS does not accept the arguments"),
    ):
        authority.issue_server()


def test_a_post_quantum_ca_signs_by_the_algorithm_of_its_name(server: Server) -> None:
    with server.opened(server.make("Tomorrow", "ML_DSA_65")) as authority:
        server.behave()
        material = authority.issue_server()
        assert authority.warnings == ()
    assert subjects(material.certificate_chain_pem) == ["CN=b1.firebuild.internal"]
    assert asked(server)["SigningAlgorithm"] == "ML_DSA_65"


def test_a_short_lived_ca_signs_for_seven_days(server: Server, root: str, subordinate: str) -> None:
    provider = server.bare(root)
    provider.open()
    answer = signed(provider, request(timedelta(days=9)))
    provider.close()
    leaf = x509.load_pem_x509_certificate(answer.certificate_pem)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == timedelta(days=7)
    assert "as the CA is in short-lived mode, seven days at most" in answer.notes[0]
    provider = server.bare(subordinate)
    provider.open()
    assert signed(provider, request(timedelta(days=9))).notes == ()
    provider.close()


def test_no_certificate_outlives_the_ca(server: Server) -> None:
    arn = server.make("Dying", "EC_prime256v1", days=3)
    provider = server.bare(arn)
    provider.open()
    answer = signed(provider, request(timedelta(days=4)))
    notes = {note.about: note for note in provider.check()}
    provider.close()
    leaf = x509.load_pem_x509_certificate(answer.certificate_pem)
    ca = x509.load_pem_x509_certificate(provider.trust_bundle().anchors_pem)
    assert leaf.not_valid_after_utc == ca.not_valid_after_utc
    assert "as that of the CA does" in answer.notes[0]
    assert notes["ca"].level is NoteLevel.WARNING
    assert notes["mode"].message.startswith("a general-purpose CA: a certificate costs more")


def test_the_same_request_twice_is_one_certificate(server: Server, root: str) -> None:
    provider = server.bare(root)
    provider.open()
    twice = request(timedelta(hours=1))
    assert provider.sign(twice) == provider.sign(twice)
    assert provider.sign(request(timedelta(hours=1))) != provider.sign(twice)
    provider.close()


def test_each_request_names_the_build_to_cloudtrail(server: Server, root: str) -> None:
    with server.opened(root) as authority:
        server.behave()
        authority.issue_server()
        assert [
            agent for agent in server.agents() if f"firebuild build/{authority.build_id}" not in agent
        ] == []
        assert server.agents() != []


def test_a_certificate_that_is_not_there_yet_is_asked_for_again(server: Server, root: str) -> None:
    server.behave(in_progress=2)
    provider = server.bare(root)
    provider.open()
    asked = request(timedelta(hours=1))
    answer, answers = provider.sign(asked), 1
    while isinstance(answer, RetryAfter):
        assert answer.reason == "AWS is issuing the certificate"
        answer, answers = provider.poll(asked, answer.handle), answers + 1
    provider.close()
    assert answers == 3
    assert server.operations()[1:] == ["IssueCertificate", *["GetCertificate"] * 3]


def test_a_workload_gets_its_uri_and_both_usages(server: Server, root: str) -> None:
    blank = "BlankEndEntityCertificate_APIPassthrough/V1"
    blocks: tuple[dict[str, Any], ...] = ({}, {"peer_template": blank})
    for block in blocks:
        with server.opened(root, **block) as authority:
            material = authority.issue(Profile.PEER, ("spiffe://builds.example/db", "db.example"))
            assert authority.warnings == ()
        leaf = leaf_of(material)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://builds.example/db"]
        assert names.get_values_for_type(x509.DNSName) == ["db.example"]
        usages = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert usages == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


def test_revoking_names_the_serial_number(server: Server, root: str) -> None:
    provider = server.bare(root)
    provider.open()
    pem = signed(provider, request(timedelta(hours=1))).certificate_pem
    provider.revoke(pem)
    provider.revoke(pem)
    server.behave(denied=["acm-pca:RevokeCertificate"])
    with pytest.raises(CAError, match="acm-pca:RevokeCertificate is not allowed"):
        provider.revoke(pem)
    provider.close()


# --- credentials -----------------------------------------------------------------------------------


def test_a_role_is_assumed_and_assumed_again_before_it_ends(server: Server, root: str) -> None:
    server.behave(external_id="of the account", denied=[])
    moment = [now()]
    with server.opened(
        root, role_arn=ROLE, external_id="of the account", role_session_name="ci", clock=lambda: moment[0]
    ) as authority:
        assert server.operations() == ["AssumeRole", "GetCertificateAuthorityCertificate"]
        _, parameters = server.calls()[0]
        assert (parameters["RoleSessionName"], parameters["ExternalId"]) == ("ci", "of the account")
        provider = server.bare(root, role_arn=ROLE, external_id="of the account")
        provider.open()
        assert provider._client is not None
        provider._client._expires = datetime.now(UTC) + timedelta(minutes=4)
        server.behave(external_id="of the account")
        provider.sign(request(timedelta(hours=1)))
        provider.close()
        assert server.operations() == ["AssumeRole", "IssueCertificate", "GetCertificate"]
        authority.issue_server()


def test_without_access_key_boto3_looks_for_one(
    server: Server, root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    credentials = tmp_path / "credentials"
    keys = f"aws_access_key_id = {BUILDS[0]}\naws_secret_access_key = {BUILDS[1]}\n"
    credentials.write_text(f"[builds]\n{keys}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    server.opened(root, access_key=None, profile="builds").close()
    monkeypatch.setenv("AWS_PROFILE", "builds")
    server.opened(root, access_key=None).close()


def test_a_role_of_a_profile_that_may_not_be_assumed_is_told_from_the_ca(
    server: Server, root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    keys = f"aws_access_key_id = {BUILDS[0]}\naws_secret_access_key = {BUILDS[1]}\n"
    role = f"[profile role]\nrole_arn = {ROLE}\nsource_profile = keys\nregion = eu-central-1\n"
    config.write_text(f"{role}[profile keys]\n{keys}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.address)
    server.opened(root, access_key=None, profile="role").close()
    assert server.operations() == ["AssumeRole", "GetCertificateAuthorityCertificate"]
    server.behave(denied=["sts:AssumeRole"])
    with pytest.raises(
        CAError, match="sts:AssumeRole is not allowed on the role that AWS's configuration names"
    ):
        server.opened(root, access_key=None, profile="role")


ELSEWHERE = {
    "AWS_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL_ACM_PCA": "http://127.0.0.1:1",
    "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:1",
    "AWS_CA_BUNDLE": "/nowhere",
    "REQUESTS_CA_BUNDLE": "/nowhere",
    "AWS_MAX_ATTEMPTS": "0",
    "AWS_RETRY_MODE": "nonsense",
    "HTTP_PROXY": "http://127.0.0.1:1",
}
BUILDS_KEYS = {"AWS_ACCESS_KEY_ID": BUILDS[0], "AWS_SECRET_ACCESS_KEY": BUILDS[1]}
OTHER_KEYS = {"AWS_PROFILE": "nobody", "AWS_ACCESS_KEY_ID": "AKIANOBODY", "AWS_SECRET_ACCESS_KEY": "nothing"}


@pytest.mark.parametrize(("block", "keys"), [({}, OTHER_KEYS), ({"access_key": None}, BUILDS_KEYS)])
def test_where_requests_go_is_up_to_the_settings(
    server: Server,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    block: dict[str, Any],
    keys: dict[str, str],
) -> None:
    for name, value in {**ELSEWHERE, **keys}.items():
        monkeypatch.setenv(name, value)
    assert notes_of(server, root, **block)["identity"].level is NoteLevel.OK
    assert server.operations()[0] == "GetCertificateAuthorityCertificate"


# --- the check -------------------------------------------------------------------------------------


def notes_of(server: Server, arn: str, **block: Any) -> dict[str, Any]:
    provider = server.bare(arn, **block)
    provider.open()
    found = provider.check()
    provider.close()
    assert len({note.about for note in found}) == len(found)
    return {note.about: note for note in found}


def test_a_healthy_ca_is_checked_without_a_certificate(server: Server, root: str) -> None:
    notes = notes_of(server, root)
    assert list(notes) == [
        *("identity", "reachable", "mode", "clock", "ca"),
        *("server template", "guest template", "fetching"),
    ]
    assert {note.level for note in notes.values()} == {NoteLevel.OK}
    assert notes["identity"].message.startswith("signed in as arn:aws:sts::")
    assert notes["mode"].message == "a CA in short-lived mode: certificates of seven days at most"
    assert notes["ca"].message.endswith("; signs with SHA256WITHECDSA")
    issued = [parameters for operation, parameters in server.calls() if operation == "IssueCertificate"]
    assert len(issued) == 2
    assert len({parameters["Csr"] for parameters in issued}) == 1


def test_a_missing_permission_is_found(server: Server, root: str) -> None:
    server.behave(
        templates=[f"{TEMPLATE}EndEntityServerAuthCertificate/V1"],
        denied=["acm-pca:GetCertificate", "acm-pca:DescribeCertificateAuthority", "sts:GetCallerIdentity"],
    )
    notes = notes_of(server, root)
    assert notes["server template"].level is NoteLevel.OK
    assert notes["guest template"].level is NoteLevel.FATAL
    assert notes["guest template"].path == "guest_template"
    assert notes["fetching"].level is NoteLevel.FATAL
    assert notes["reachable"].level is NoteLevel.WARNING
    assert notes["reachable"].hint.startswith("a build does without; allow acm-pca:Describe")
    assert notes["identity"].level is NoteLevel.WARNING


def test_an_unclear_answer_is_no_missing_permission(server: Server, root: str) -> None:
    server.behave(errors={"IssueCertificate": "ValidationException", "GetCertificate": "InternalFailure"})
    notes = notes_of(server, root)
    assert notes["server template"].level is NoteLevel.WARNING
    assert notes["fetching"].level is NoteLevel.FATAL


def test_a_template_that_does_not_exist_is_found_in_use(server: Server, root: str) -> None:
    with (
        server.opened(root, server_template="EndEntityTypoCertificate/V1") as authority,
        pytest.raises(CAError, match="AWS does not accept the arguments"),
    ):
        authority.issue_server()


# --- TLS -------------------------------------------------------------------------------------------


def test_the_endpoint_is_verified_with_the_ca_file(tmp_path: Path) -> None:
    validity = Validity.starting(now(), timedelta(days=1), backdate=timedelta(minutes=5))
    ca = make_root(generate_key(), validity, with_intermediate=False)
    key = generate_key()
    leaf = make_leaf(key.public_key(), ca, validity, profile=Profile.SERVER, dns_names=("localhost",))
    certificate, secret, anchors = tmp_path / "tls.pem", tmp_path / "tls-key.pem", tmp_path / "ca.pem"
    certificate.write_bytes(to_pem([leaf]))
    secret.write_bytes(private_key_pem(key))
    anchors.write_bytes(to_pem([ca.certificate]))
    with serving(certificate, secret) as server:
        with pytest.raises(CAError, match="there is no such private CA"):
            server.opened(MISSING, ca_file=anchors)
        with pytest.raises(
            CAError, match=r"https://localhost:[0-9]+: its TLS certificate is not accepted"
        ) as caught:
            server.opened(MISSING)
        assert "ca_file" in str(caught.value.hint)
        with pytest.raises(CAError, match="cannot read ca_file"):
            server.opened(MISSING, ca_file=tmp_path / "none.pem")
