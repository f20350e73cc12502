"""CAs with ML-DSA keys (FIPS 204): real handshakes, what is refused, and the forms of their keys."""

from __future__ import annotations

import ssl
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import mldsa
from OpenSSL import crypto

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.handshake import is_beyond_openssl
from firebuild_bootstrap.mmds.document import bootstrap_block
from firebuild_pki import CAError, MaterialError, SettingsError, TLSMaterial, open_authority
from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.keys import CAKeyType, kind_of_key, make_ca_keys, private_key_pem
from firebuild_pki.provider import Profile, TrustBundle
from firebuild_pki.verify import Expectation, verify_certificate, verify_trust
from firebuild_pki.x509 import Validity, make_intermediate, make_root, to_pem
from pki.tools import certificates

KINDS = {
    "ml-dsa-44": (CAKeyType.ML_DSA_44, False),
    "ml-dsa-44-intermediate": (CAKeyType.ML_DSA_44, True),
    "ml-dsa-65": (CAKeyType.ML_DSA_65, False),
    "ml-dsa-87": (CAKeyType.ML_DSA_87, False),
}


@dataclass(frozen=True)
class Ends:
    """Server and guest of one build, and those of another CA with the same names."""

    kind: CAKeyType
    server: TLSMaterial
    guest: TLSMaterial
    other_server: TLSMaterial
    other_guest: TLSMaterial


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    kind, intermediate = request.param
    settings = {"embedded": {"key_type": kind.value, "intermediate": intermediate}}
    with open_authority(settings, build_id="b") as one, open_authority(settings, build_id="b") as other:
        yield Ends(kind, one.issue_server(), one.issue_guest(), other.issue_server(), other.issue_guest())
        assert one.warnings == ()


def broken(material: TLSMaterial, number: int = 0) -> TLSMaterial:
    """Flip a bit in the signature of one of its certificates."""
    chain = certificates(material.certificate_chain_pem)
    der = bytearray(chain[number].public_bytes(serialization.Encoding.DER))
    der[-1000] ^= 1
    chain[number] = x509.load_der_x509_certificate(bytes(der))
    return replace(material, certificate_chain_pem=to_pem(chain))


def test_server_and_guest_below_such_a_ca_talk(ends: Ends) -> None:
    seen = handshake(ends.server, ends.guest)
    assert (seen.tls_version, seen.group) == ("TLSv1.3", "X25519MLKEM768")
    assert {one.lower() for one in seen.signatures} == {ends.kind.value}


def test_each_end_refuses_the_other_of_another_ca(ends: Ends) -> None:
    with pytest.raises(MaterialError, match="the server refuses the guest: unable to get local issuer"):
        handshake(ends.server, replace(ends.other_guest, trust_pem=ends.guest.trust_pem))
    # Python 3.13 with OpenSSL 3.5 looks at the root that the server sent first.
    reason = "(unable to get local issuer|self-signed certificate in certificate chain)"
    with pytest.raises(MaterialError, match=f"the guest refuses the server: {reason}"):
        handshake(ends.other_server, ends.guest)


def test_each_end_refuses_a_signature_with_a_flipped_bit(ends: Ends) -> None:
    for number in range(len(certificates(ends.server.certificate_chain_pem))):
        with pytest.raises(MaterialError, match="the server refuses the guest: certificate signature fail"):
            handshake(ends.server, broken(ends.guest, number))
        with pytest.raises(MaterialError, match="the guest refuses the server: certificate signature fail"):
            handshake(broken(ends.server, number), ends.guest)


def test_the_framework_verifies_each_signature_of_such_a_chain(ends: Ends) -> None:
    now = datetime.now(UTC)
    trust = verify_trust(TrustBundle(ends.server.trust_pem), now)
    (leaf, *issuers) = certificates(ends.server.certificate_chain_pem)
    expected = Expectation(Profile.SERVER, (ends.server.identity,), leaf.public_key(), now, now)
    verify_certificate(ends.server.certificate_chain_pem, b"", trust, expected)
    for number in range(1 + len(issuers)):
        with pytest.raises(MaterialError, match=r"has a missing link|signature is of another key"):
            pem = broken(ends.server, number).certificate_chain_pem
            verify_certificate(pem, b"", verify_trust(TrustBundle(ends.server.trust_pem), now), expected)


def test_a_guest_without_a_certificate_is_refused(ends: Ends) -> None:
    with pytest.raises(MaterialError, match="the server refuses the guest: peer did not return a cert"):
        handshake(ends.server, ends.guest, anonymous=True)


def test_a_guest_knows_whether_its_openssl_is_too_old(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    block = bootstrap_block(ends.guest, host_port="h:1")
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 22, 0))
    assert is_beyond_openssl(block)
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 5, 0, 0, 0))
    assert not is_beyond_openssl(block)
    with open_authority(build_id="b") as authority:
        classical = bootstrap_block(authority.issue_guest(), host_port="h:1")
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_INFO", (3, 0, 0, 22, 0))
    assert not is_beyond_openssl(classical)


@pytest.mark.parametrize("kind", ["ml-dsa-65", "ml-dsa-87"])
def test_an_intermediate_that_makes_the_chain_too_long_is_refused_in_words(kind: str) -> None:
    with pytest.raises(SettingsError, match=f"with {kind}, the guest's chain gets longer than gRPC's server"):
        open_authority({"embedded": {"key_type": kind, "intermediate": True}}, build_id="b")


def test_server_and_guest_cannot_have_such_keys_themselves() -> None:
    with pytest.raises(SettingsError, match="gRPC cannot use a certificate with a key of the kind ml-dsa-65"):
        open_authority({"key_type": "ml-dsa-65"}, build_id="b")


# --- in files -------------------------------------------------------------------------------------


def as_openssl_writes_it(pem: bytes, passphrase: bytes | None = None) -> bytes:
    """Write a key as `openssl genpkey` does: seed and expanded form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        key = crypto.load_privatekey(crypto.FILETYPE_PEM, pem)
        how = ("aes256", passphrase) if passphrase else ()
        written: bytes = crypto.dump_privatekey(crypto.FILETYPE_PEM, key, *how)
    assert len(written) > 3000
    return written


def without_seed(pem: bytes) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        der = crypto.dump_privatekey(
            crypto.FILETYPE_ASN1, crypto.load_privatekey(crypto.FILETYPE_PEM, as_openssl_writes_it(pem))
        )
    expanded = der[-2560:]
    inner = b"\x04\x82\x0a\x00" + expanded
    body = b"\x02\x01\x00\x30\x0b\x06\x09\x60\x86\x48\x01\x65\x03\x04\x03\x11"
    body += b"\x04\x82" + len(inner).to_bytes(2, "big") + inner
    text = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    return ssl.DER_cert_to_PEM_cert(text).replace("CERTIFICATE", "PRIVATE KEY").encode()


class Files:
    """A CA with its intermediate, in files."""

    def __init__(self, directory: Path, kind: CAKeyType = CAKeyType.ML_DSA_44) -> None:
        self.directory = directory
        validity = Validity.starting(datetime.now(UTC), timedelta(days=40), backdate=timedelta(minutes=5))
        above, below = make_ca_keys(kind, 2)
        root = make_root(above, validity, with_intermediate=True)
        self.issuer = make_intermediate(below, root, validity)
        self.write("root.pem", to_pem([root.certificate]))
        self.write("ca.pem", to_pem([self.issuer.certificate, root.certificate]))
        self.write("only.pem", to_pem([self.issuer.certificate]))
        self.key = private_key_pem(below)

    def write(self, name: str, content: bytes) -> str:
        path = self.directory / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        return str(path)

    def settings(self, key: bytes, **more: object) -> dict[str, object]:
        block = {"ca_cert": str(self.directory / "ca.pem"), "ca_key": self.write("ca.key", key), **more}
        return {"provider": "file", "file": block}


def secret(value: str) -> dict[str, object]:
    return {"ca_key_passphrase": {"env": value}}


@pytest.mark.parametrize("kind", [CAKeyType.ML_DSA_44, CAKeyType.ML_DSA_65, CAKeyType.ML_DSA_87], ids=str)
@pytest.mark.parametrize("form", ["seed", "both", "seed-encrypted", "both-encrypted"])
def test_a_key_in_a_file_signs_in_each_form_that_has_its_seed(
    kind: CAKeyType, form: str, tmp_path: Path
) -> None:
    files = Files(tmp_path, kind)
    key = files.issuer.key
    assert isinstance(key, mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey)
    written = {
        "seed": lambda: files.key,
        "both": lambda: as_openssl_writes_it(files.key),
        "seed-encrypted": lambda: key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open"),
        ),
        "both-encrypted": lambda: as_openssl_writes_it(files.key, b"open"),
    }[form]()
    more = secret("PASS") if "encrypted" in form else {}
    settings = files.settings(written, **more, anchors=[str(tmp_path / "only.pem")])
    with open_authority(settings, build_id="b", environ={"PASS": "open"}) as authority:
        (note,) = [note for note in authority.check() if note.about == "ca"]
        assert f"signs with {kind.value.upper()}" in note.message
        assert handshake(authority.issue_server(), authority.issue_guest()).group == "X25519MLKEM768"


def test_a_key_in_a_file_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    files = Files(tmp_path)
    with pytest.raises(CAError, match="the ML-DSA key in it has no seed"):
        open_authority(files.settings(without_seed(files.key)), build_id="b")
    encrypted = files.settings(as_openssl_writes_it(files.key, b"open"), **secret("PASS"))
    with pytest.raises(CAError, match="ca_key_passphrase does not decrypt the key"):
        open_authority(encrypted, build_id="b", environ={"PASS": "wrong"})


def test_a_chain_that_is_too_long_for_grpc_is_named_before_a_machine_is_started(tmp_path: Path) -> None:
    files = Files(tmp_path, CAKeyType.ML_DSA_65)
    with open_authority(files.settings(files.key), build_id="b") as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
    words = r"the 2 certificates of guest.b.firebuild.internal have \d+ bytes, and a gRPC server takes 8400"
    with pytest.raises(InputError, match=words) as caught:
        bootstrap_block(guest, host_port="h:1")
    assert "name it in anchors" in str(caught.value.hint)
    with pytest.raises(MaterialError, match=words):
        handshake(server, guest)


def test_kinds_have_the_names_of_the_standard() -> None:
    assert [kind_of_key(make_ca_keys(kind, 1)[0].public_key()) for kind in CAKeyType if "dsa" in kind] == [
        "ML-DSA-44",
        "ML-DSA-65",
        "ML-DSA-87",
    ]
