"""From a leaf to an anchor: which ways hold, what people read of the others; all held against real TLS."""

from __future__ import annotations

import ipaddress
import re
import ssl
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, ExtensionOID, NameOID

from firebuild_pki import (
    Authority,
    MaterialError,
    PluginCatalog,
    Profile,
    SignedCertificate,
    SignRequest,
    TLSMaterial,
    TrustBundle,
    open_authority,
)
from firebuild_pki import chain as chain_module
from firebuild_pki.chain import Links, describe, parse_certificates
from firebuild_pki.grpc_handshake import handshake as grpc_handshake
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.preflighting import certificate_facts
from firebuild_pki.provider import utc_now
from firebuild_pki.verify import Expectation, Verified, verify_certificate, verify_trust
from firebuild_pki.x509 import leaf_subject
from pki import signers
from pki.signers import Plugin, csr_key
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, ca_settings, certificates, entry, handshake, pem

NOW = utc_now().replace(microsecond=0)
LONG = (NOW - timedelta(days=1), NOW + timedelta(days=30))
# Before the deadline of `issued`, and long after the end of the test run.
ENDING = (NOW - timedelta(days=1), NOW + timedelta(hours=6))
EXPIRED = (NOW - timedelta(days=2), NOW - timedelta(minutes=1))
NAME = "b.firebuild.internal"
DNS, URI = x509.DNSName, x509.UniformResourceIdentifier


def root(name: str = "Root", **more: Any) -> OperatorCA:
    return OperatorCA(name, **{"valid": LONG, **more})


def below(issuer: OperatorCA, name: str = "Issuing", **more: Any) -> OperatorCA:
    return OperatorCA(name, issuer, **{"valid": LONG, **more})


@dataclass
class Backend:
    """A CA that signs for the framework, and what it hands out besides."""

    issuer: OperatorCA
    chain: Iterable[OperatorCA] = ()
    anchors: Iterable[OperatorCA] = ()
    intermediates: Iterable[OperatorCA] = ()
    flaws: dict[str, Any] | None = None

    def trust_bundle(self) -> TrustBundle:
        anchors, between = (
            pem(*(one.certificate for one in some)) for some in (self.anchors, self.intermediates)
        )
        return TrustBundle(anchors or self.issuer.pem, between)

    def sign(self, request: SignRequest) -> SignedCertificate:
        usage = SERVER_AUTH if request.profile is Profile.SERVER else CLIENT_AUTH
        flaws = {
            "usages": [usage],
            "valid": (LONG[0], utc_now() + request.ttl),
            "subject": leaf_subject(request.dns_names),
            **(self.flaws or {}),
        }
        leaf = self.issuer.leaf(csr_key(request), request.dns_names, **flaws)
        return SignedCertificate(pem(leaf), pem(*(one.certificate for one in self.chain)))


def opened(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Authority:
    class Provider(signers.Anchored):
        trust_bundle = staticmethod(backend.trust_bundle)
        sign = staticmethod(backend.sign)

    monkeypatch.setattr(signers, "arranged", Plugin("arranged", lambda _s, _c: Provider()), raising=False)
    catalog = PluginCatalog(providers=[entry("arranged", "pki.signers:arranged")])
    return open_authority(ca_settings({"provider": "arranged"}, catalog), build_id="b")


@dataclass(frozen=True)
class Outcome:
    """What issuing came to: the materials or the error, and the warnings."""

    ends: tuple[TLSMaterial, TLSMaterial] | None
    error: str
    warnings: tuple[str, ...]


def issued(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    deadline = NOW + timedelta(hours=12)
    with opened(backend, monkeypatch) as authority:
        try:
            ends = (
                authority.issue_server(build_deadline=deadline),
                authority.issue_guest(build_deadline=deadline),
            )
        except MaterialError as error:
            return Outcome(None, str(error), authority.warnings)
        return Outcome(ends, "", authority.warnings)


def talk(outcome: Outcome) -> None:
    assert outcome.ends is not None, outcome.error
    server, guest = outcome.ends
    assert grpc_handshake(server, guest).server_name == NAME
    handshake(server.ssl_context(server_side=True), guest.ssl_context(), NAME)


# --- identifiers -----------------------------------------------------------------------------------


def another(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def pinned(issuer: x509.Name, serial: int) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier(None, [x509.DirectoryName(issuer)], serial)


ANYBODY = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Anybody")])


def test_a_leaf_whose_authority_key_identifier_is_of_another_key_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca = root()
    outcome = issued(Backend(ca, flaws={"authority_key": another(generate_key())}), monkeypatch)
    assert 'does not lead to "CN=Root"' in outcome.error
    assert "its authority key identifier is " in outcome.error
    assert "but the subject key identifier of the issuer is " in outcome.error


def test_so_is_one_that_names_another_serial_number_or_issuer(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root()
    serial, subject = ca.certificate.serial_number, ca.certificate.subject
    assert (
        "names the issuer's serial number 7, not "
        in issued(Backend(ca, flaws={"authority_key": pinned(subject, 7)}), monkeypatch).error
    )
    assert (
        'names an issuer that "CN=Anybody" issued'
        in issued(Backend(ca, flaws={"authority_key": pinned(ANYBODY, serial)}), monkeypatch).error
    )
    talk(issued(Backend(ca, flaws={"authority_key": pinned(subject, serial)}), monkeypatch))


def test_identifiers_are_compared_along_the_whole_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root()
    issuing = below(ca, authority_key=another(generate_key()))
    outcome = issued(Backend(issuing, chain=[issuing], anchors=[ca]), monkeypatch)
    assert '"CN=Issuing"' in outcome.error
    assert 'does not lead to "CN=Root"' in outcome.error


def test_what_is_refused_for_its_identifier_is_refused_by_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root()
    stranger = another(generate_key())
    good = issued(Backend(ca), monkeypatch)
    assert good.ends is not None
    server, guest = good.ends
    key = generate_key()
    leaf = ca.leaf(key.public_key(), [NAME], usages=[SERVER_AUTH], valid=LONG, authority_key=stranger)

    bad = replace(server, certificate_chain_pem=pem(leaf), private_key_pem=private_key_pem(key))
    with pytest.raises(MaterialError, match="the guest refuses the server"):
        grpc_handshake(bad, guest)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(bad.ssl_context(server_side=True), guest.ssl_context(), NAME)


def test_of_two_issuers_of_one_name_and_key_the_identifier_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root()
    old = below(ca)
    new = below(ca, key=old.key)
    serial = new.certificate.serial_number
    flaws = {"authority_key": pinned(ca.certificate.subject, serial)}
    outcome = issued(Backend(new, chain=[old, new], anchors=[ca], flaws=flaws), monkeypatch)
    talk(outcome)
    assert outcome.ends is not None
    assert certificates(outcome.ends[0].certificate_chain_pem)[1:] == [new.certificate]


# --- editions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("worse", [ENDING, EXPIRED])
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_editions_of_an_intermediate_the_one_that_holds_is_taken(
    worse: tuple[datetime, datetime], order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = root()
    good = below(ca)
    bad = below(ca, key=good.key, valid=worse)
    outcome = issued(Backend(good, chain=[good, bad][::order], anchors=[ca]), monkeypatch)
    talk(outcome)
    assert outcome.ends is not None
    assert certificates(outcome.ends[0].certificate_chain_pem)[1:] == [good.certificate]


@pytest.mark.parametrize("worse", [ENDING, EXPIRED])
@pytest.mark.parametrize("order", [1, -1])
def test_of_two_editions_of_an_anchor_the_one_that_holds_is_taken(
    worse: tuple[datetime, datetime], order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = root()
    bad = root(key=good.key, valid=worse)
    outcome = issued(Backend(good, anchors=[good, bad][::order]), monkeypatch)
    talk(outcome)
    assert outcome.ends is not None
    # BoringSSL would take the first of that name, and not look for another once it has expired
    assert certificates(outcome.ends[0].trust_pem) == [good.certificate]
    assert any("it is left out of the trust bundle" in text for text in outcome.warnings) == (
        worse is EXPIRED
    )


@pytest.mark.parametrize("order", [1, -1])
def test_an_edition_below_another_root_counts_as_well(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = root("Old Root", valid=ENDING), root("New Root")
    first = below(old, valid=ENDING)
    crossed = below(new, key=first.key)
    backend = Backend(first, chain=[first, crossed][::order], anchors=[old, new][::order])
    outcome = issued(backend, monkeypatch)
    talk(outcome)
    assert outcome.ends is not None
    assert certificates(outcome.ends[0].certificate_chain_pem)[1:] == [crossed.certificate]


def test_without_an_edition_that_holds_the_latest_is_complained_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca = root()
    ending = below(ca, valid=ENDING)
    expired = below(ca, key=ending.key, valid=EXPIRED)
    outcome = issued(Backend(ending, chain=[expired, ending], anchors=[ca]), monkeypatch)
    assert '"CN=Issuing"' in outcome.error
    assert "but the build may need it until" in outcome.error


def test_a_bundle_of_nothing_but_expired_anchors_is_refused() -> None:
    bundle = TrustBundle(root(valid=EXPIRED).pem + root("Other", valid=EXPIRED).pem)
    with pytest.raises(MaterialError, match=r'"CN=Root" .* expired at .* \(hint: renew it'):
        verify_trust(bundle, NOW)


def test_expired_intermediates_in_the_bundle_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root()
    good = below(ca)
    old = below(ca, key=good.key, valid=EXPIRED)
    outcome = issued(Backend(good, anchors=[ca], intermediates=[old, good]), monkeypatch)
    talk(outcome)
    assert len(outcome.warnings) == 1


def test_a_heap_of_cas_that_all_sign_each_other_is_searched_in_no_time() -> None:
    keys = [generate_key() for _ in range(12)]
    names = [f"CA {number}" for number in range(12)]
    roots = [root(name, key=key) for name, key in zip(names, keys, strict=True)]
    heap = [
        below(above, name, key=key)
        for name, key in zip(names, keys, strict=True)
        for above in roots
        if above.name != name
    ]
    key = generate_key().public_key()
    leaf = heap[0].leaf(key, [NAME], valid=LONG)
    trust = verify_trust(TrustBundle(root("Stranger").pem), NOW)
    expected = Expectation(Profile.SERVER, (NAME,), key, NOW, NOW)
    with pytest.raises(MaterialError, match="the chain has a missing link"):
        verify_certificate(pem(leaf), pem(*(one.certificate for one in heap)), trust, expected)
    # Each way ends below one of the roots, so each counts.
    ways = Links().paths(leaf, [one.certificate for one in heap], [one.certificate for one in roots])
    assert sum(1 for _ in ways) == 64


# --- signatures and keys that are not accepted -----------------------------------------------------


def openssl(place: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=place, check=True, capture_output=True)


def verified(chain: bytes, trust: bytes, *, profile: Profile = Profile.SERVER) -> Verified:
    (leaf, *_) = parse_certificates(chain, "chain")
    now = utc_now() + timedelta(seconds=1)
    bundle = verify_trust(TrustBundle(trust), now)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    name = names.get_values_for_type(DNS)[0]
    expected = Expectation(profile, (name,), leaf.public_key(), now, now, exact=False)
    return verify_certificate(chain, b"", bundle, expected)


CONFIG = f"""[ca]
basicConstraints=critical,CA:TRUE
subjectKeyIdentifier=hash
authorityKeyIdentifier=keyid
[leaf]
subjectAltName=DNS:{NAME}
extendedKeyUsage=serverAuth
keyUsage=critical,digitalSignature
[req]
distinguished_name=d
[d]
"""
P256 = "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
RSA = "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits"
EXPLICIT = "ecparam -name prime256v1 -genkey -noout -param_enc explicit"


def made(
    place: Path, key: str, digest: str = "", leaf_digest: str = "", *, root_key: str = P256
) -> tuple[bytes, bytes]:
    """Let OpenSSL make root, intermediate and leaf.

    Args:
        place: where its files are.
        key: the command that makes the key of the intermediate.
        digest: what the root signs the intermediate with.
        leaf_digest: what the intermediate signs the leaf with.
        root_key: the command that makes the key of the root.

    Returns:
        The chain, and the root.
    """
    (place / "x.cnf").write_text(CONFIG)
    for name, command in (("root", root_key), ("mid", key), ("leaf", P256)):
        requested(place, name, command)
    openssl(
        place, "x509 -req -days 9 -extfile x.cnf -extensions ca -in root.csr -signkey root.key -out root.pem"
    )
    openssl(place, f"{SIGN} -extensions ca -in mid.csr -CA root.pem -CAkey root.key {digest} -out mid.pem")
    return with_leaf(place, leaf_digest), (place / "root.pem").read_bytes()


SIGN = "x509 -req -days 9 -extfile x.cnf -CAcreateserial"


def requested(place: Path, name: str, command: str) -> None:
    make, _, convert = command.partition(" then ")
    openssl(place, f"{make} -out {name}.key")
    if convert:
        openssl(place, f"{convert} -in {name}.key -out {name}.key")
    openssl(place, f"req -new -config x.cnf -key {name}.key -subj /CN={name} -out {name}.csr")


def with_leaf(place: Path, more: str = "") -> bytes:
    openssl(place, f"{SIGN} -extensions leaf -in leaf.csr -CA mid.pem -CAkey mid.key {more} -out leaf.pem")
    return (place / "leaf.pem").read_bytes() + (place / "mid.pem").read_bytes()


REFUSED: dict[str, tuple[str, str, str, str]] = {
    "SHA-1": (P256, "-sha1", "", r'"CN=mid" .* is signed with SHA-1, which is not accepted any more'),
    "MD5": (f"{RSA}:2048", "", "-md5", r'"CN=leaf" .* is signed with MD5, which is not accepted any more'),
    "leaf SHA-1": (P256, "", "-sha1", r'"CN=leaf" .* is signed with SHA-1, which is not accepted any more'),
    "SHA-224": (P256, "-sha224", "", r'"CN=mid" .* is signed with ecdsa-with-SHA224; accepted are ECDSA and'),
    "RSA 1024": (f"{RSA}:1024", "", "", r'"CN=mid" .* has an RSA key of 1024 bits; 2048 are the least'),
    "brainpool": (
        "ecparam -name brainpoolP256r1 -genkey -noout",
        "",
        "",
        r'"CN=mid" .* has a key on the curve brainpoolP256r1; accepted are P-256, P-384, P-521',
    ),
    "odd curve": (
        "ecparam -name secp112r1 -genkey -noout",
        "",
        "",
        r'"CN=mid" .* has a public key that cannot be read: it uses something that is not supported',
    ),
    "explicit": (
        EXPLICIT,
        "",
        "",
        r'"CN=mid" .* spells out the parameters of its elliptic curve, where TLS accepts the curve',
    ),
    "RSA-PSS with a long salt": (
        P256,
        "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:100",
        "",
        r'"CN=mid" .* is signed with RSA-PSS whose parameters TLS does not accept: a salt of 32 bytes',
    ),
    "a large exponent": (
        f"{RSA}:2048 -pkeyopt rsa_keygen_pubexp:{2**33 + 17}",
        "",
        "",
        r'"CN=mid" .* has an RSA key whose public exponent has more than 33 bits',
    ),
    "hybrid point": (
        f"{P256} then ec -conv_form hybrid",
        "",
        "",
        r'"CN=mid" .* has a public key \(EC P-256\) in a form that TLS does not read',
    ),
    "Ed25519": (
        "genpkey -algorithm ed25519",
        "",
        "",
        r'"CN=leaf" .* is signed with ed25519; accepted are ECDSA and RSA',
    ),
}


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_accepted_any_more_is_named_in_one_sentence(case: str, tmp_path: Path) -> None:
    key, digest, leaf_digest, words = REFUSED[case]
    root_key = f"{RSA}:2048" if "pss" in digest else P256
    chain, trust = made(tmp_path, key, digest, leaf_digest, root_key=root_key)
    with pytest.raises(MaterialError, match=words) as caught:
        verified(chain, trust)
    text = str(caught.value)
    assert not {"\n", "{"} & {*text}
    assert len(text) < 600
    assert "missing link" not in text


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("size", [32, 48, 64])
def test_rsa_pss_is_accepted_with_a_salt_as_long_as_the_hash(size: int, tmp_path: Path) -> None:
    digest = f"-sha{size * 8} -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:{size}"
    chain, trust = made(tmp_path, f"{RSA}:2048", digest, root_key=f"{RSA}:2048")
    assert len(verified(chain, trust).chain.issuers) == 1


@pytest.mark.needs("openssl")
def test_the_point_of_a_key_may_be_compressed(tmp_path: Path) -> None:
    chain, trust = made(tmp_path, f"{P256} then ec -conv_form compressed")
    assert len(chain) < len(made(tmp_path, P256)[0])
    assert verified(chain, trust)


@pytest.mark.needs("openssl")
def test_an_anchor_may_have_been_signed_with_anything(tmp_path: Path) -> None:
    chain, _ = made(tmp_path, P256, "-sha1")
    leaf, middle = certificates(chain)
    assert verified(pem(leaf), pem(middle)).chain.anchor == middle


@pytest.mark.needs("openssl")
def test_a_root_that_signed_itself_with_sha1_is_told_from_an_intermediate(tmp_path: Path) -> None:
    chain, _ = made(tmp_path, P256)
    command = (
        "x509 -req -days 9 -sha1 -extfile x.cnf -extensions ca -in root.csr -signkey root.key -out root.pem"
    )
    openssl(tmp_path, command)
    trust = (tmp_path / "root.pem").read_bytes()
    assert [describe(one)[:9] for one in verified(chain + trust, trust).chain.certificates] == [
        '"CN=leaf"',
        '"CN=mid" ',
    ]


@pytest.mark.needs("openssl")
def test_a_leaf_with_the_parameters_of_its_curve_spelt_out_is_refused(tmp_path: Path) -> None:
    _, trust = made(tmp_path, P256)
    requested(tmp_path, "leaf", EXPLICIT)
    with pytest.raises(MaterialError, match=r'"CN=leaf" .* spells out the parameters of its') as caught:
        verified(with_leaf(tmp_path), trust)
    assert "\n" not in str(caught.value)


def test_keys_of_other_kinds_are_named() -> None:
    ca = root()
    leaf = ca.leaf(ed25519.Ed25519PrivateKey.generate().public_key(), [NAME], valid=LONG)
    with pytest.raises(
        MaterialError,
        match=r'"CN=leaf" .* has a key of the kind Ed25519; accepted are EC, RSA and, for CAs, ML-DSA',
    ):
        verified(pem(leaf), ca.pem)


# --- serial numbers, and what else cryptography remarks --------------------------------------------


@pytest.mark.needs("openssl")
@pytest.mark.parametrize(
    ("serial", "words"),
    [
        ("0", "is zero; RFC 5280 section 4.1.2.2 forbids that"),
        ("-5", "is negative; RFC 5280"),
        ("0x" + "7f" * 21, "has 21 bytes; RFC 5280 section 4.1.2.2 allows 20 at most"),
        ("0x" + "ff" * 20, "has 21 bytes"),
    ],
)
def test_a_serial_number_that_no_certificate_may_have_is_refused_in_words(
    serial: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, trust = made(tmp_path, P256)
    chain = with_leaf(tmp_path, f"-set_serial {serial}")
    with loud(), pytest.raises(MaterialError, match=words):
        verified(chain, trust)
    assert capfd.readouterr().err == ""


@pytest.mark.needs("openssl")
def test_an_old_ca_may_have_the_serial_number_zero(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chain, _ = made(tmp_path, P256)
    again = "x509 -req -days 9 -extfile x.cnf -extensions ca -in root.csr -signkey root.key -out root.pem"
    openssl(tmp_path, f"{again} -set_serial 0")
    with loud():
        assert verified(chain, (tmp_path / "root.pem").read_bytes()).chain.anchor
        (facts,) = certificate_facts((tmp_path / "root.pem").read_bytes())
    assert facts.serial == "0"
    assert capfd.readouterr().err == ""


@contextmanager
def loud() -> Iterator[None]:
    """Let warnings come out where they would."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


# --- name constraints ------------------------------------------------------------------------------


def directory(**names: str) -> x509.DirectoryName:
    oids = {"o": NameOID.ORGANIZATION_NAME, "cn": NameOID.COMMON_NAME}
    return x509.DirectoryName(x509.Name([x509.NameAttribute(oids[key], text) for key, text in names.items()]))


def network(text: str) -> x509.IPAddress:
    return x509.IPAddress(ipaddress.ip_network(text))


ORGANISED = x509.Name(
    [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme"),
        x509.NameAttribute(NameOID.COMMON_NAME, "leaf"),
    ]
)
PERMITTED: dict[str, tuple[list[x509.GeneralName] | None, list[x509.GeneralName] | None, dict[str, Any]]] = {
    "leading dot": ([DNS(".firebuild.internal")], None, {}),
    "the domain": ([DNS("firebuild.internal")], None, {}),
    "several": ([DNS("example.com"), DNS(".firebuild.internal")], None, {}),
    "everything": ([DNS("")], None, {}),
    "underscores": ([DNS("_acme.example.com"), DNS(".internal")], None, {}),
    "capitals": ([DNS(".FireBuild.Internal")], None, {}),
    "excluded elsewhere": (None, [DNS(".example.com")], {}),
    "addresses": ([DNS(".internal"), network("10.0.0.0/8")], [network("0.0.0.0/0")], {}),
    "URIs": ([URI(".example.com"), DNS(".internal")], None, {}),
    "mail": ([x509.RFC822Name("example.com"), DNS(".internal")], None, {}),
    "directory": ([directory(o="ACME"), DNS(".internal")], None, {"subject": ORGANISED}),
    "no subject": ([directory(o="Acme")], None, {"subject": x509.Name([])}),
    "directory elsewhere": (None, [directory(o="Other")], {"subject": ORGANISED}),
}
FORBIDDEN: dict[
    str, tuple[list[x509.GeneralName] | None, list[x509.GeneralName] | None, dict[str, Any], str]
] = {
    "another domain": ([DNS(".example.com")], None, {}, f'do not permit the name "{NAME}"'),
    "only below": ([DNS(f".{NAME}")], None, {}, f'do not permit the name "{NAME}"'),
    "no label": ([DNS("uild.internal")], None, {}, f'do not permit the name "{NAME}"'),
    "excluded": (None, [DNS(".internal")], {}, f'exclude the name "{NAME}"'),
    "excluded within": ([DNS(".internal")], [DNS("firebuild.internal")], {}, f'exclude the name "{NAME}"'),
    "directory": ([directory(o="Acme")], None, {}, 'do not permit the name "CN=leaf"'),
    "excluded directory": (
        None,
        [directory(o="Acme")],
        {"subject": ORGANISED},
        'exclude the name "CN=leaf,O=Acme"',
    ),
}


@pytest.mark.parametrize("case", PERMITTED)
@pytest.mark.parametrize("above", [False, True])
def test_name_constraints_are_read_the_way_tls_reads_them(
    case: str, above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    permitted, excluded, flaws = PERMITTED[case]
    ca = root(constraints=x509.NameConstraints(permitted, excluded))
    if above and case not in {"directory", "no subject"}:  # else the CA below would need a fitting name
        issuing = below(ca)
        backend = Backend(issuing, chain=[issuing], anchors=[ca], flaws=flaws)
    else:
        backend = Backend(ca, flaws=flaws)
    outcome = issued(backend, monkeypatch)
    talk(outcome)
    assert outcome.warnings == ()


@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_name_constraints_forbid_is_refused_in_words_as_tls_refuses_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    permitted, excluded, flaws, words = FORBIDDEN[case]
    subject = {"subject": x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])}
    plain = root()
    ca = root(key=plain.key, constraints=x509.NameConstraints(permitted, excluded))
    outcome = issued(Backend(ca, flaws={**subject, **flaws}), monkeypatch)
    assert f"the name constraints of {describe(ca.certificate)}" in outcome.error
    assert words in outcome.error
    free = issued(Backend(plain, flaws={**subject, **flaws}), monkeypatch)
    assert free.ends is not None
    server, guest = (replace(one, trust_pem=ca.pem) for one in free.ends)
    with pytest.raises(MaterialError, match="refuses the"):
        grpc_handshake(server, guest)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server.ssl_context(server_side=True), guest.ssl_context(), NAME)


def other_name_problem(permitted: x509.GeneralName, name: x509.GeneralName) -> str | None:
    constraints = x509.NameConstraints([permitted, DNS("firebuild.internal")], None)
    ca = root(constraints=constraints)
    leaf = ca.leaf(generate_key().public_key(), [NAME], other_names=[name], valid=LONG)
    try:
        verified(pem(leaf), ca.pem)
    except MaterialError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("permitted", "within", "outside"),
    [
        (network("10.0.0.0/8"), "10.1.2.3", "11.1.2.3"),
        (network("10.0.0.0/8"), "10.1.2.3", "::1"),
        (network("fd00::/8"), "fd00::1", "10.1.2.3"),
    ],
)
def test_addresses_are_within_networks(permitted: x509.IPAddress, within: str, outside: str) -> None:
    names = [x509.IPAddress(ipaddress.ip_address(text)) for text in (within, outside)]
    assert other_name_problem(permitted, names[0]) is None
    assert f'do not permit the name "{outside}"' in str(other_name_problem(permitted, names[1]))


@pytest.mark.parametrize(
    ("permitted", "within", "outside"),
    [
        (URI(".example.com"), URI("spiffe://a.example.com/x"), URI("spiffe://example.com/x")),
        (URI("example.com"), URI("https://Example.com:8/"), URI("https://a.example.com/")),
        (URI("example.com"), URI("https://example.com"), URI("https://[")),
        (
            x509.RFC822Name("example.com"),
            x509.RFC822Name("a@example.com"),
            x509.RFC822Name("a@b.example.com"),
        ),
        (
            x509.RFC822Name(".example.com"),
            x509.RFC822Name("a@b.example.com"),
            x509.RFC822Name("a@example.com"),
        ),
        (
            x509.RFC822Name("a@example.com"),
            x509.RFC822Name("a@EXAMPLE.com"),
            x509.RFC822Name("b@example.com"),
        ),
    ],
)
def test_hosts_of_other_names_are_within_domains(
    permitted: x509.GeneralName, within: x509.GeneralName, outside: x509.GeneralName
) -> None:
    assert other_name_problem(permitted, within) is None
    assert "do not permit the name" in str(other_name_problem(permitted, outside))


def test_a_kind_of_name_that_nobody_can_judge_is_refused() -> None:
    oid = x509.RegisteredID(x509.ObjectIdentifier("1.2.3"))
    assert "are about a kind of name (RegisteredID)" in str(other_name_problem(oid, oid))


DOTTED = x509.NameConstraints([DNS(".firebuild.internal")], None)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


@pytest.mark.parametrize(
    ("upper", "lower", "words"),
    [
        ({}, {"ca": False}, r'"CN=Issuing" .* is not a CA'),
        ({}, {"ca": None}, r'"CN=Issuing" .* is not a CA'),
        ({}, {"key_cert_sign": False}, r'key usage of "CN=Issuing" .* does not allow signing certificates'),
        ({}, {"extended_usage": [CLIENT_AUTH]}, r'"CN=Issuing" .* forbids this kind of leaf'),
        ({"path_length": 0}, {}, r'path length of "CN=Root" .* allows 0 CAs below it'),
        ({}, {"more": [(UNKNOWN, True)]}, r'"CN=Issuing" .* has the critical extension 1\.2\.3\.4'),
    ],
)
def test_below_a_dotted_constraint_the_other_rules_hold_as_well(
    upper: dict[str, Any], lower: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = root(constraints=DOTTED, **upper)
    issuing = below(ca, **lower)
    outcome = issued(Backend(issuing, chain=[issuing], anchors=[ca]), monkeypatch)
    assert outcome.ends is None
    assert re.search(words, outcome.error), outcome.error


POLICIES = x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("2.5.29.32.0"), None)])
"""Any policy."""
ABOUT_POLICIES: dict[str, x509.ExtensionType] = {
    "policies": POLICIES,
    "no mapping": x509.PolicyConstraints(None, 0),
    "not any policy": x509.InhibitAnyPolicy(0),
    "a policy far below": x509.PolicyConstraints(5, None),
}


@pytest.mark.parametrize("at", ["anchor", "below"])
@pytest.mark.parametrize("case", ABOUT_POLICIES)
def test_critical_extensions_about_policies_are_none_that_tls_refuses(
    case: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [(ABOUT_POLICIES[case], True)]
    ca = root(more=more if at == "anchor" else [])
    issuing = below(ca, more=more if at == "below" else [])
    outcome = issued(Backend(issuing, chain=[issuing], anchors=[ca]), monkeypatch)
    talk(outcome)


@pytest.mark.parametrize("critical", [True, False])
@pytest.mark.parametrize("skipped", [0, 1])
def test_a_ca_that_requires_a_policy_is_refused_in_words_as_grpc_refuses_it(
    skipped: int, critical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = root()
    key = generate_key()
    free, strict = (
        below(ca, key=key, more=more) for more in ([], [(x509.PolicyConstraints(skipped, None), critical)])
    )
    outcome = issued(Backend(strict, chain=[strict], anchors=[ca]), monkeypatch)
    assert f"{describe(strict.certificate)} requires a policy, and " in outcome.error
    assert outcome.error.endswith(" names none")
    usual = issued(Backend(free, chain=[free], anchors=[ca]), monkeypatch)
    assert usual.ends is not None
    ends = [
        replace(one, certificate_chain_pem=one.certificate_chain_pem.replace(free.pem, strict.pem))
        for one in usual.ends
    ]
    with pytest.raises(MaterialError, match="no explicit policy"):
        grpc_handshake(*ends)


def test_an_anchor_may_require_policies_and_so_may_a_ca_far_above(monkeypatch: pytest.MonkeyPatch) -> None:
    ca = root(more=[(x509.PolicyConstraints(0, None), True)])
    upper = below(ca, more=[(x509.PolicyConstraints(2, None), True)])
    talk(issued(Backend(upper, chain=[upper], anchors=[ca]), monkeypatch))
    lower = OperatorCA("Lower", upper, valid=LONG)
    outcome = issued(Backend(lower, chain=[lower, upper], anchors=[ca]), monkeypatch)
    assert f"{describe(upper.certificate)} requires a policy" in outcome.error


def test_a_critical_extension_that_grpc_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = x509.CRLDistributionPoints(
        [x509.DistributionPoint([URI("http://ca.example/crl")], None, None, None)]
    )
    ca = root(constraints=DOTTED, more=[(points, True)])
    outcome = issued(Backend(ca), monkeypatch)
    assert "has the critical extension 2.5.29.31, which is unknown" in outcome.error


def raw(oid: x509.ObjectIdentifier, value: str) -> x509.UnrecognizedExtension:
    """An extension that cryptography would not write like this."""
    return x509.UnrecognizedExtension(oid, bytes.fromhex(value))


ACCESS = x509.AuthorityInformationAccess(
    [x509.AccessDescription(AuthorityInformationAccessOID.CA_ISSUERS, URI("http://ca.example/ca"))]
)
A_POLICY = x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.4"), None)
ANY_USAGE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE])
# firebuild.internal is permitted, with a minimum of 1
MINIMUM = f"301ba01930178212{b'firebuild.internal'.hex()}800101"
ONLY_GRPC_KNEW: dict[str, tuple[x509.ExtensionType, bool, str]] = {
    "critical access": (ACCESS, True, r"has the extension 1\.3\.6\.1\.5\.5\.7\.1\.1 as a critical one"),
    "any usage": (ANY_USAGE, False, r"the extended key usage of .* forbids this kind of leaf"),
    "a policy twice": (x509.CertificatePolicies([A_POLICY, A_POLICY]), False, "names a policy twice"),
    "no policies": (raw(ExtensionOID.CERTIFICATE_POLICIES, "3000"), False, "an empty list of policies"),
    "any policy mapped": (
        raw(ExtensionOID.POLICY_MAPPINGS, "300d300b0604551d200006032a0304"),
        False,
        "maps anyPolicy",
    ),
    "a minimum": (raw(ExtensionOID.NAME_CONSTRAINTS, MINIMUM), False, "with a minimum or a maximum"),
}


@pytest.mark.parametrize("case", ONLY_GRPC_KNEW)
def test_what_grpc_refuses_in_a_ca_is_refused_in_words_before_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extension, critical, words = ONLY_GRPC_KNEW[case]
    ca, key = root(), generate_key()
    usual, odd = (below(ca, key=key, more=more) for more in ([], [(extension, critical)]))
    outcome = issued(Backend(odd, chain=[odd], anchors=[ca]), monkeypatch)
    assert outcome.ends is None
    assert re.search(words, outcome.error), outcome.error
    assert "candidates exhausted" not in outcome.error
    ends = issued(Backend(usual, chain=[usual], anchors=[ca]), monkeypatch).ends
    assert ends is not None
    with pytest.raises(MaterialError, match="handshake"):
        grpc_handshake(
            *(
                replace(one, certificate_chain_pem=one.certificate_chain_pem.replace(usual.pem, odd.pem))
                for one in ends
            )
        )


@pytest.mark.parametrize("case", [one for one in ONLY_GRPC_KNEW if one != "a minimum"])
def test_of_an_anchor_grpc_reads_less(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extension, critical, _ = ONLY_GRPC_KNEW[case]
    ca = root(more=[(extension, critical)])
    outcome = issued(Backend(ca), monkeypatch)
    assert outcome.ends is not None, outcome.error
    grpc_handshake(*outcome.ends)


def test_what_grpc_refuses_in_a_leaf_is_refused_before_it_also_where_its_ca_is_known() -> None:
    ca, key = root(), generate_key()
    trust = verify_trust(TrustBundle(ca.pem), NOW)
    good = ca.leaf(key.public_key(), [NAME], valid=LONG)
    odd = ca.leaf(key.public_key(), [NAME], valid=LONG, more=[(x509.SubjectKeyIdentifier(b"k"), True)])
    wanted = Expectation(Profile.SERVER, (NAME,), key.public_key(), NOW, NOW)
    for _ in range(2):
        assert verify_certificate(pem(good), b"", trust, wanted)
        with pytest.raises(
            MaterialError, match=r"the extension 2\.5\.29\.14 as a critical one, which it must"
        ):
            verify_certificate(pem(odd), b"", trust, wanted)
    large = ec.generate_private_key(ec.SECP521R1())
    leaf = ca.leaf(large.public_key(), [NAME], valid=LONG)
    with pytest.raises(MaterialError, match=r"curve P-521; gRPC accepts P-256 and P-384 at the ends"):
        verified(pem(leaf), ca.pem)


def test_a_ca_that_renews_its_own_key_does_not_count_for_the_path_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca = root(constraints=DOTTED, path_length=0)
    renewed = OperatorCA("Root", ca, valid=LONG)  # self-issued, with another key
    talk(issued(Backend(renewed, chain=[renewed], anchors=[ca]), monkeypatch))


def test_mail_addresses_in_a_subject_are_held_against_the_constraints_as_well() -> None:
    ca = root(constraints=x509.NameConstraints([x509.RFC822Name("example.com")], None))
    attributes = [x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a@elsewhere.com")]
    leaf = ca.leaf(generate_key().public_key(), [NAME], subject=x509.Name(attributes), valid=LONG)
    with pytest.raises(MaterialError, match=r'do not permit the name "a@elsewhere\.com"'):
        verified(pem(leaf), ca.pem)


@pytest.mark.needs("openssl")
def test_an_algorithm_that_nobody_knows_is_named_by_its_number(tmp_path: Path) -> None:
    if subprocess.run(
        ["openssl", "genpkey", "-algorithm", "SM2"], capture_output=True, check=False
    ).returncode:
        pytest.skip("this OpenSSL has no SM2")
    chain, trust = made(tmp_path, "genpkey -algorithm SM2")
    with pytest.raises(
        MaterialError, match=r'"CN=leaf" .* is signed with an algorithm that is not supported'
    ):
        verified(chain, trust)
    ca = root()
    leaf = ca.leaf(generate_key().public_key(), [NAME], valid=LONG)
    mixed = pem(leaf) + (tmp_path / "mid.pem").read_bytes()  # strays do no harm
    assert verified(mixed, ca.pem)


def damaged(certificate: x509.Certificate, old: bytes, new: bytes) -> bytes:
    der = certificate.public_bytes(serialization.Encoding.DER)
    assert old in der
    return ssl.DER_cert_to_PEM_cert(der.replace(old, new)).encode()


def test_a_certificate_whose_insides_are_damaged_is_refused_in_words() -> None:
    ca = root()
    usage = bytes.fromhex("0603551d0f")  # the key usage becomes a second extension of another kind
    twice = damaged(ca.certificate, usage, bytes.fromhex("0603551d13"))
    for pem_text in (twice, ca.pem.replace(b"M", b"!", 3)):
        with pytest.raises(MaterialError, match="cannot be read: ") as caught:
            verify_trust(TrustBundle(pem_text), NOW)
        assert len(str(caught.value)) < 200
        assert "\n" not in str(caught.value)
    with pytest.raises(MaterialError, match="cannot be read: "):
        certificate_facts(twice)
    with pytest.raises(MaterialError, match="expected PEM text as chain, found int"):
        parse_certificates(5, "chain")  # type: ignore[arg-type]
    with pytest.raises(MaterialError, match="expected a TrustBundle, found NoneType"):
        verify_trust(None, NOW)  # type: ignore[arg-type]


def test_what_is_known_of_cas_does_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "_MAX_LINKS", 2)
    links, ca = Links(), root()
    for _ in range(5):
        leaf = ca.leaf(generate_key().public_key(), [NAME], valid=LONG)
        assert links.problem(leaf, ca.certificate) is None
        other = root().certificate
        assert links.is_root(other)
    assert max(len(one) for one in (links._known, links._roots)) <= 3
