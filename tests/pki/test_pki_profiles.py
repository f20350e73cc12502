"""The certificates of the embedded CA: every row of the profile, judged by us and by others."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from pkilint.bin import (  # type: ignore[import-untyped]
    lint_pkix_cert,
    lint_pkix_signer_signee_cert_chain,
)

from firebuild_pki import KeyType, TLSMaterial, open_authority
from firebuild_pki.provider import Profile
from firebuild_pki.x509 import Issuer, Validity, make_leaf
from pki.tools import CLIENT_AUTH, NOW, SERVER_AUTH, Clock, OperatorCA, certificates, handshake, pem

SHAPES = [(key_type, shape) for key_type in KeyType for shape in (True, False)]


@dataclass(frozen=True)
class Issued:
    """All the certificates of one authority."""

    server: TLSMaterial
    guest: TLSMaterial
    intermediate: bool

    @property
    def root(self) -> x509.Certificate:
        (root,) = certificates(self.server.trust_pem)
        return root

    @property
    def issuers(self) -> list[x509.Certificate]:
        """From the root down to the one that signs leaves."""
        return [self.root, *certificates(self.server.certificate_chain_pem)[1:]]

    @property
    def leaves(self) -> dict[Profile, x509.Certificate]:
        return {
            Profile.SERVER: certificates(self.server.certificate_chain_pem)[0],
            Profile.GUEST: certificates(self.guest.certificate_chain_pem)[0],
        }

    @property
    def all(self) -> list[x509.Certificate]:
        return [*self.issuers, *self.leaves.values()]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
def issued(request: pytest.FixtureRequest) -> Iterator[Issued]:
    key_type, intermediate = request.param
    settings = {
        "key_type": key_type,
        "embedded": {"key_type": key_type, "intermediate": intermediate},
    }
    with open_authority(settings, build_id="b-1") as authority:
        yield Issued(authority.issue_server(), authority.issue_guest(), intermediate)
        assert authority.warnings == ()


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> x509.ExtensionType:
    return certificate.extensions.get_extension_for_class(kind).value


def is_critical(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> bool:
    return certificate.extensions.get_extension_for_class(kind).critical


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::PendingDeprecationWarning")
def test_the_linter_finds_nothing(issued: Issued, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(certificate: x509.Certificate) -> str:
        path = tmp_path / f"{certificate.serial_number}.pem"
        path.write_bytes(pem(certificate))
        return str(path)

    for certificate in issued.all:
        diagnostics = lint_pkix_cert.main(["lint", "-s", "WARNING", written(certificate)])
        assert diagnostics == 0, capsys.readouterr().out
    issuer = issued.issuers[-1]
    links = [(issuer, leaf) for leaf in issued.leaves.values()]
    links += [(issued.root, issuer)] if issued.intermediate else []
    for signer, signee in links:
        diagnostics = lint_pkix_signer_signee_cert_chain.main(
            ["lint", "-s", "WARNING", written(signer), written(signee)]
        )
        assert diagnostics == 0, capsys.readouterr().out


@pytest.mark.parametrize(("end", "purpose"), [("server", "sslserver"), ("guest", "sslclient")])
@pytest.mark.needs("openssl")
def test_openssl_accepts_the_chain_for_its_purpose_only(
    issued: Issued, end: str, purpose: str, tmp_path: Path
) -> None:
    material: TLSMaterial = getattr(issued, end)
    (tmp_path / "root.pem").write_bytes(material.trust_pem)
    (tmp_path / "chain.pem").write_bytes(material.certificate_chain_pem)

    def verify(wanted: str) -> int:
        command = ["openssl", "verify", "-x509_strict", "-purpose", wanted, "-CAfile", "root.pem"]
        command += ["-untrusted", "chain.pem", "chain.pem"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode

    other = {"sslserver": "sslclient", "sslclient": "sslserver"}[purpose]
    assert verify(purpose) == 0
    assert verify(other) != 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_standard_library_shakes_hands_in_strict_mode(issued: Issued, version: ssl.TLSVersion) -> None:
    server, guest = issued.server.ssl_context(server_side=True), issued.guest.ssl_context()
    for context in (server, guest):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.minimum_version = context.maximum_version = version
    end = handshake(server, guest, issued.guest.server_name)
    assert end.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]


def test_serials_hold_at_least_64_random_bits(issued: Issued) -> None:
    serials = {certificate.serial_number for certificate in issued.all}
    assert len(serials) == len(issued.all)
    assert max(serial.bit_length() for serial in serials) > 120


def test_names_of_the_cas_are_distinct_and_those_of_the_leaves_are_labels(issued: Issued) -> None:
    subjects = [certificate.subject.rfc4514_string() for certificate in issued.issuers]
    assert all(subjects)
    assert len(set(subjects)) == len(subjects)
    for profile, name in [
        (Profile.SERVER, "b-1.firebuild.internal"),
        (Profile.GUEST, "guest.b-1.firebuild.internal"),
    ]:
        leaf = issued.leaves[profile]
        assert leaf.subject.rfc4514_string() == f"CN={name}"
        assert extension(leaf, x509.SubjectAlternativeName) == x509.SubjectAlternativeName(
            [x509.DNSName(name)]
        )
        assert not is_critical(leaf, x509.SubjectAlternativeName)


def test_basic_constraints_leave_no_room_for_more_cas(issued: Issued) -> None:
    lengths = [1, 0] if issued.intermediate else [0]
    for certificate, length in zip(issued.issuers, lengths, strict=True):
        assert extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(True, length)
    for leaf in issued.leaves.values():
        assert extension(leaf, x509.BasicConstraints) == x509.BasicConstraints(False, None)
    assert all(is_critical(certificate, x509.BasicConstraints) for certificate in issued.all)


def test_key_usage_is_critical_and_minimal(issued: Issued) -> None:
    def usages(certificate: x509.Certificate) -> set[str]:
        usage = extension(certificate, x509.KeyUsage)
        assert isinstance(usage, x509.KeyUsage)
        rest = ("key_agreement", "key_cert_sign", "crl_sign", "content_commitment")
        names = ("digital_signature", "key_encipherment", "data_encipherment", *rest)
        return {name for name in names if getattr(usage, name)}

    assert all(usages(certificate) == {"key_cert_sign", "crl_sign"} for certificate in issued.issuers)
    assert all(usages(leaf) == {"digital_signature"} for leaf in issued.leaves.values())
    assert all(is_critical(certificate, x509.KeyUsage) for certificate in issued.all)


def test_extended_key_usage_is_one_direction_only(issued: Issued) -> None:
    found = {profile: extension(leaf, x509.ExtendedKeyUsage) for profile, leaf in issued.leaves.items()}
    assert found == {
        Profile.SERVER: x509.ExtendedKeyUsage([SERVER_AUTH]),
        Profile.GUEST: x509.ExtendedKeyUsage([CLIENT_AUTH]),
    }
    for certificate in issued.issuers:
        with pytest.raises(x509.ExtensionNotFound):
            extension(certificate, x509.ExtendedKeyUsage)


def test_key_identifiers_link_each_certificate_to_its_issuer(issued: Issued) -> None:
    issuer = issued.issuers[-1]
    links = [(leaf, issuer) for leaf in issued.leaves.values()]
    links += [(issuer, issued.root)] if issued.intermediate else []
    for certificate, signer in links:
        own = extension(signer, x509.SubjectKeyIdentifier)
        theirs = extension(certificate, x509.AuthorityKeyIdentifier)
        assert isinstance(own, x509.SubjectKeyIdentifier)
        assert isinstance(theirs, x509.AuthorityKeyIdentifier)
        assert own.digest == theirs.key_identifier
    assert all(extension(certificate, x509.SubjectKeyIdentifier) for certificate in issued.all)
    with pytest.raises(x509.ExtensionNotFound):
        extension(issued.root, x509.AuthorityKeyIdentifier)


def test_the_chain_is_leaf_first_and_without_the_root(issued: Issued) -> None:
    for material in (issued.server, issued.guest):
        chain = certificates(material.certificate_chain_pem)
        assert len(chain) == (2 if issued.intermediate else 1)
        assert issued.root not in chain
        for certificate, signer in zip(chain, [*chain[1:], issued.root], strict=True):
            certificate.verify_directly_issued_by(signer)


def test_private_keys_are_pkcs8_and_of_the_chosen_kind(
    request: pytest.FixtureRequest, issued: Issued
) -> None:
    sizes = {"p256": 256, "p384": 384, "rsa2048": 2048, "rsa3072": 3072, "rsa4096": 4096}
    wanted = next(size for name, size in sizes.items() if f"[{name}-" in request.node.name)
    assert issued.server.private_key_pem.startswith(b"-----BEGIN PRIVATE KEY-----")
    key = serialization.load_pem_private_key(issued.server.private_key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    assert key.key_size == wanted
    assert key.public_key() == issued.leaves[Profile.SERVER].public_key()
    for certificate in issued.issuers:
        ca_key = certificate.public_key()
        assert isinstance(ca_key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        assert ca_key.key_size == wanted


def test_validity_begins_in_the_past_and_ends_in_whole_seconds() -> None:
    clock = Clock(NOW + timedelta(milliseconds=700))
    settings = {"embedded": {"backdate": "10m"}}
    with open_authority(settings, build_id="b", clock=clock) as authority:
        material = authority.issue_server(ttl=timedelta(minutes=30))
    assert material.not_before == NOW - timedelta(minutes=10)
    assert material.not_after == NOW + timedelta(minutes=30)
    assert material.not_before.tzinfo is UTC


def test_a_leaf_stays_within_the_validity_of_its_ca() -> None:
    clock = Clock()
    settings = {"embedded": {"backdate": "5m", "ca_lifetime": "20m"}}
    with open_authority(settings, build_id="b", clock=clock) as authority:
        material = authority.issue_server(ttl=timedelta(hours=2))
        (root,) = certificates(authority.trust_pem)
    assert root.not_valid_after_utc == NOW + timedelta(minutes=20)
    assert material.not_after == root.not_valid_after_utc
    assert material.not_before == root.not_valid_before_utc


def test_a_name_too_long_for_a_label_leaves_the_subject_empty_and_the_names_critical() -> None:
    build_id = "b" * 63
    with open_authority(build_id=build_id) as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        assert authority.warnings == ()
    leaf = certificates(server.certificate_chain_pem)[0]
    assert leaf.subject.rfc4514_string() == ""
    assert is_critical(leaf, x509.SubjectAlternativeName)
    handshake(server.ssl_context(server_side=True), guest.ssl_context(), server.server_name)


def test_a_leaf_below_a_ca_without_key_identifier_names_its_key() -> None:
    ca = OperatorCA(identifiers=False)
    issuer = Issuer(ca.certificate, ca.key)
    validity = Validity.starting(NOW, timedelta(hours=1), backdate=timedelta(0))
    leaf = make_leaf(ca.key.public_key(), issuer, validity, profile=Profile.GUEST, dns_names=["a.b"])
    assert extension(leaf, x509.AuthorityKeyIdentifier) == (
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    )


def test_a_leaf_never_begins_before_its_ca() -> None:
    ca = OperatorCA(valid=(NOW - timedelta(minutes=1), NOW + timedelta(days=1)))
    validity = Validity.starting(NOW, timedelta(hours=1), backdate=timedelta(minutes=5))
    issuer = Issuer(ca.certificate, ca.key)
    leaf = make_leaf(ca.key.public_key(), issuer, validity, profile=Profile.GUEST, dns_names=["a.b"])
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=1)


def test_an_issuer_does_not_show_its_key() -> None:
    ca = OperatorCA()
    assert repr(Issuer(ca.certificate, ca.key)) == "Issuer('CN=Operator Root')"
