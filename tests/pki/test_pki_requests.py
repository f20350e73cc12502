"""Signing requests that somebody else made: trusted in nothing, and the key stays where it is."""

from __future__ import annotations

from base64 import encodebytes
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AttributeOID, NameOID

from firebuild_pki import (
    EventKind,
    IdentityError,
    MaterialError,
    Profile,
    UnsupportedOperation,
    open_authority,
)
from firebuild_pki.keys import generate_key, private_key_pem
from firebuild_pki.x509 import make_csr
from pki import characters
from pki.tools import ca_settings, catalog_of, certificates, handshake, opened

NAMES = ("agent.b.firebuild.internal",)
Builder = x509.CertificateSigningRequestBuilder


def test_a_guest_s_own_request_is_signed_and_its_key_works() -> None:
    characters.witness.events.clear()
    settings = ca_settings({"observers": ["witness"]}, catalog_of(observers=["witness"]))
    key = generate_key()
    with open_authority(settings, build_id="b") as authority:
        server = authority.issue_server()
        mine = authority.sign_csr(
            make_csr(key, NAMES), Profile.CLIENT, NAMES, timedelta(minutes=20), server_name=server.server_name
        )
        assert not hasattr(mine, "private_key_pem")
        assert certificates(mine.certificate_chain_pem)[0].public_key() == key.public_key()
        client = mine.with_key(private_key_pem(key))
        handshake(server.ssl_context(server_side=True), client.ssl_context(), client.server_name)
        renewed = authority.renew(client)
        assert renewed.private_key_pem != client.private_key_pem
    assert (mine.names, mine.profile, mine.ttl) == (NAMES, Profile.GUEST, timedelta(minutes=20))
    assert [event.names for event in characters.witness.events if event.kind is EventKind.ISSUED][1] == NAMES


def _built(
    change: Callable[[Builder], Builder] = lambda it: it,
    *,
    key: Any = None,
    names: Sequence[x509.GeneralName] = tuple(map(x509.DNSName, NAMES)),
    subject: x509.Name = x509.Name([]),  # noqa: B008 - a constant
) -> bytes:
    builder = Builder(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    signed = change(builder).sign(key or generate_key(), algorithm)
    return signed.public_bytes(serialization.Encoding.PEM)


def _tampered() -> bytes:
    der = bytearray(x509.load_pem_x509_csr(_built()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    body = encodebytes(bytes(der))
    return b"-----BEGIN CERTIFICATE REQUEST-----\n" + body + b"-----END CERTIFICATE REQUEST-----\n"


CA = x509.BasicConstraints(True, None)
EVIL = x509.DNSName("b.firebuild.internal")
REQUESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "cannot be read"),
    "nonsense": (lambda: b"\x00\x1b[31m" * 99, "the signing request cannot be read: "),
    "too long": (lambda: _built() + b"\n" * 500_000, "409600 bytes at most"),
    "another's key": (_tampered, "not by its own key"),
    "ed25519": (lambda: _built(key=ed25519.Ed25519PrivateKey.generate()), "is of the kind Ed25519"),
    "p521": (lambda: _built(key=ec.generate_private_key(ec.SECP521R1())), "is on the curve secp521r1"),
    "rsa 1024": (
        lambda: _built(key=rsa.generate_private_key(65537, 1024)),
        "the key of the signing request is RSA with 1024 bits or an odd exponent; 2048 to 4096",
    ),
    "rsa e=3": (lambda: _built(key=rsa.generate_private_key(3, 2048)), "odd exponent"),
    "no names": (lambda: _built(names=[]), "found subject alternative names: none"),
    "the server's name": (lambda: _built(names=[EVIL]), "names: b.firebuild.internal"),
    "one name more": (
        lambda: _built(names=[x509.DNSName(NAMES[0]), EVIL]),
        "expected a signing request for agent",
    ),
    "a CA": (
        lambda: _built(lambda it: it.add_extension(CA, critical=True)),
        "asks for the extension 2.5.29.19",
    ),
    "a subject": (
        lambda: _built(subject=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])),
        "found CN=root",
    ),
    "an attribute": (
        lambda: _built(lambda it: it.add_attribute(AttributeOID.CHALLENGE_PASSWORD, b"hello")),
        "attributes besides its names",
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_asks_for_more_than_its_names_is_refused(case: str) -> None:
    request, words = REQUESTS[case]
    with open_authority(build_id="b") as authority:
        with pytest.raises(MaterialError) as caught:
            authority.sign_csr(request(), Profile.CLIENT, NAMES)
        assert words in str(caught.value)
        assert "\x1b" not in str(caught.value)


def test_what_stands_around_a_request_goes_nowhere() -> None:
    with open_authority(build_id="b") as authority:
        assert authority.sign_csr(b"Bag Attributes\n" + _built(), Profile.CLIENT, NAMES)


def test_finished_certificates_sign_no_request() -> None:
    with opened("pairs") as authority:
        for name in (NAMES[0], "guest.b.firebuild.internal"):
            with pytest.raises(UnsupportedOperation):
                authority.sign_csr(_built(names=[x509.DNSName(name)]), Profile.CLIENT, name)


def test_the_caller_s_names_are_held_to_the_rules_too() -> None:
    with open_authority() as authority, pytest.raises(IdentityError):
        authority.sign_csr(_built(), Profile.CLIENT, ["*.b"])
