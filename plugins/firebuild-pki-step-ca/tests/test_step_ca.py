"""Signing, revoking, looking, and what each refusal of a real step-ca is turned into."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x448
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from firebuild_pki import CAError, NoteLevel, Profile, ProviderContext, SettingsError
from firebuild_pki.http import HTTPAnswer
from firebuild_pki.keys import generate_key
from firebuild_pki.x509 import Issuer, Validity, make_leaf, to_pem
from joserfc.jwk import ECKey, RSAKey

from firebuild_pki_step_ca import tokens
from firebuild_pki_step_ca.client import Client, Refused
from firebuild_pki_step_ca.settings import JWKAuth, StepCASettings, X5CAuth
from step_ca_servers import (
    PASSWORD,
    Pki,
    bare,
    encrypt,
    leaf_of,
    now,
    opened,
    saying,
    section,
    serving,
    write,
    x5c,
)

pytestmark = pytest.mark.needs("step-ca")


def refusal(written: Any, clock: Any = now, **environ: str) -> CAError:
    with pytest.raises(CAError) as caught, opened(written, clock, **environ) as authority:
        authority.issue_server()
    assert PASSWORD not in f"{caught.value!r} {caught.value} {caught.value.__cause__!r}"
    return caught.value


def test_the_template_of_the_provisioner_decides_the_usage(server: str, pki: Pki) -> None:
    with opened(section(server, pki)) as authority:
        material = authority.issue_server()
        assert authority.warnings == ()
    usage = leaf_of(material.certificate_chain_pem).extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(usage.value) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_workload_has_its_spiffe_id_and_both_usages(server: str, pki: Pki) -> None:
    spiffe = "spiffe://firebuild.internal/builds/7"
    with opened(section(server, pki)) as authority:
        material = authority.issue(Profile.PEER, ["db.firebuild.internal", spiffe], labels={"tag": "app:1"})
        assert authority.warnings == ()
    assert material.names == ("db.firebuild.internal", spiffe)


def test_without_a_template_both_usages_are_a_warning(server: str, pki: Pki) -> None:
    key = {"env": "JWK"}
    text = json.dumps(pki.jwk.as_dict(private=True))
    written = section(server, pki, {"provisioner": "plain", "key": key, "password": None})
    with opened(written, JWK=text) as authority:
        authority.issue_guest()
        assert any("serverAuth" in warning for warning in authority.warnings)


@pytest.mark.parametrize("form", ["jwk", "pem", "compact"])
def test_an_ed25519_key_signs_tokens(server: str, pki: Pki, form: str) -> None:
    plain = json.dumps(pki.edwards.as_dict(private=True))
    pem = pki.edwards.as_pem(private=True).decode()
    text = {"jwk": plain, "pem": pem, "compact": pki.encrypted(pki.edwards)}[form]
    password = {"env": "PASSWORD"} if form == "compact" else None
    auth = {"provisioner": "edwards", "key": {"env": "JWK"}, "password": password}
    with opened(section(server, pki, auth), JWK=text) as authority:
        authority.issue_server()


def test_a_certificate_with_an_ed25519_key_signs_tokens(server: str, pki: Pki, tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    ca_key = load_pem_private_key(pki.ca_key.read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    issuer = Issuer(leaf_of(pki.ca.read_bytes()), ca_key)
    valid = Validity.starting(now(), timedelta(hours=1), backdate=timedelta(minutes=1))
    leaf = make_leaf(key.public_key(), issuer, valid, profile=Profile.GUEST, dns_names=("b.example",))
    write(tmp_path, "own", to_pem([leaf, issuer.certificate]))
    write(tmp_path, "own-key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    written = section(server, pki)
    written["step-ca"]["auth"] = x5c(Pki(tmp_path, pki.jwk, pki.jwk), "own")
    with opened(written) as authority:
        authority.issue_guest(ttl=timedelta(minutes=50))
        with pytest.raises(CAError, match=r"the certificate in auth\.cert_file ends before") as refused:
            authority.issue_guest(ttl=timedelta(minutes=70))
    assert "renew it" in str(refused.value.hint)


def test_the_root_may_be_known_by_its_fingerprint_alone(server: str, pki: Pki) -> None:
    digest = hashlib.sha256(leaf_of(pki.root.read_bytes()).public_bytes(Encoding.DER)).hexdigest().upper()
    colons = ":".join(digest[at : at + 2] for at in range(0, 64, 2))
    written = section(server, pki, root=None, root_fingerprint=colons)
    with opened(written) as authority:
        assert leaf_of(authority.trust_pem) == leaf_of(pki.root.read_bytes())
        authority.issue_server()


def test_a_root_with_another_fingerprint_is_refused(server: str, pki: Pki) -> None:
    error = refusal(section(server, pki, root=None, root_fingerprint="0" * 64))
    assert "has no root with the fingerprint in root_fingerprint" in error.message
    error = refusal(section("https://127.0.0.1:1", pki, root=None, root_fingerprint="0" * 64))
    assert "https://127.0.0.1:1: connection refused" in error.message
    assert error.retryable


def http(status: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        ("200 OK", lambda pki: {"ca": pki.stranger.read_text()}, "has no root with the fingerprint"),
        ("200 OK", lambda _: {"ca": 1}, "has no root with the fingerprint"),
        ("200 OK", lambda _: [], "has no root with the fingerprint"),
        ("502 Bad Gateway", lambda _: {}, "reading the root was refused"),
    ],
    ids=["another's root", "no text", "no object", "a proxy's fault"],
)
def test_what_is_not_the_root_is_not_taken_for_it(
    pki: Pki, status: str, body: Callable[[Pki], object], said: str
) -> None:
    digest = hashlib.sha256(leaf_of(pki.root.read_bytes()).public_bytes(Encoding.DER)).hexdigest()
    with saying(pki, lambda: [http(status, body(pki))]) as address:
        assert said in refusal(section(address, pki, root=None, root_fingerprint=digest)).message


def drops(piece: bytes) -> Iterator[bytes]:
    """Say something again and again, until nobody takes it."""
    while True:
        time.sleep(0.05)
        yield piece


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("pieces", "timeout", "said"),
    [
        (lambda: chain([HEAD, b"\r\n"], repeat(b"x" * 65536)), "60s", "longer than 1048576 bytes"),
        (lambda: chain([HEAD, b"\r\n"], drops(b"x")), "1s", "no answer in time"),
        (lambda: chain([HEAD], drops(b"A: b\r\n")), "1s", "no answer in time"),
        (lambda: drops(b"H"), "1s", "no answer in time"),
    ],
    ids=["a flood", "a body", "headers", "a line"],
)
def test_an_answer_without_end_is_not_the_root(
    pki: Pki, pieces: Callable[[], Iterator[bytes]], timeout: str, said: str
) -> None:
    with saying(pki, pieces) as address:
        written = section(address, pki, root=None, root_fingerprint="0" * 64, timeout=timeout)
        assert said in refusal(written).message


def test_a_limit_below_what_builds_ask_for_is_told(server: str, pki: Pki) -> None:
    provider = bare(section(server, pki, {"provisioner": "brief"}))
    provider.open()
    (note,) = [one for one in provider.check() if one.about == "provisioner"]
    provider.close()
    assert note.level is NoteLevel.WARNING
    assert 'provisioner "brief" signs for up to 10m, and a build asks for 1h' in note.message
    assert "raise maxTLSCertDuration" in str(note.hint)


@pytest.mark.parametrize("form", ["jwk", "pem", "compact", "flattened"])
def test_the_key_is_read_in_every_form(server: str, pki: Pki, form: str) -> None:
    plain = json.dumps(pki.jwk.as_dict(private=True))
    parts = ("protected", "encrypted_key", "iv", "ciphertext", "tag")
    text = {
        "jwk": plain,
        "pem": pki.jwk.as_pem(private=True).decode(),
        "compact": pki.encrypted(),
        "flattened": json.dumps(dict(zip(parts, pki.encrypted().split("."), strict=True))),
    }[form]
    password = None if form in {"jwk", "pem"} else {"env": "PASSWORD"}
    with opened(section(server, pki, {"key": {"env": "JWK"}, "password": password}), JWK=text) as authority:
        authority.issue_server()


def test_a_key_is_read_with_as_many_rounds_as_step_writes(pki: Pki) -> None:
    text = encrypt(json.dumps(pki.jwk.as_dict(private=True)), 600_000)
    auth = JWKAuth.model_validate({**section("h", pki)["step-ca"]["auth"], "key": {"env": "K"}})
    known = [{"key": {**pki.jwk.as_dict(private=False), "kid": "k"}}]
    signer = tokens.jwk_signer(auth, known, {"K": text, "PASSWORD": PASSWORD})
    assert (signer.algorithm, signer.header) == ("ES256", {"kid": "k"})
    assert "'d'" not in repr(signer)
    auth = JWKAuth.model_validate({**section("h", pki)["step-ca"]["auth"], "key": {"env": "K"}})
    with pytest.raises(CAError, match="the private key cannot be read"):
        tokens.jwk_signer(auth, known, {"K": text[:-9], "PASSWORD": PASSWORD})


@pytest.mark.parametrize(
    ("auth", "environ", "message", "hint"),
    [
        (
            {"provisioner": "nobody"},
            {},
            'step-ca has no JWK provisioner "nobody"',
            "its JWK provisioners are: ",
        ),
        (
            {},
            {"PASSWORD": "wrong"},
            "the key that step-ca has: the private key cannot be read",
            "password right",
        ),
        ({"provisioner": "plain"}, {}, "does not have the private key of the provisioner", "set auth.key"),
        ({"key": {"env": "OTHER"}}, {}, 'auth.key is not the key of the provisioner "builds"', "replaced"),
        (
            {"key": {"env": "OTHER"}, "password": None},
            {},
            "auth.key: the key is encrypted",
            "set auth.password",
        ),
        ({"key": {"env": "JUNK"}}, {}, "auth.key: the private key cannot be read", "password right"),
        ({"key": {"env": "PUBLIC"}}, {}, "expected a private key, found a public one", ""),
        ({"key": {"env": "UNUSED"}}, {}, "is not encrypted, and has a passphrase set", "leave it out"),
    ],
)
def test_a_key_that_cannot_be_used_is_explained(
    server: str, pki: Pki, auth: dict[str, Any], environ: dict[str, str], message: str, hint: str
) -> None:
    texts = {
        "OTHER": pki.encrypted(pki.other_jwk),
        "JUNK": "a.b.c",
        "PUBLIC": json.dumps(pki.jwk.as_dict(private=False)),
        "UNUSED": pki.jwk.as_pem(private=True).decode(),
    }
    error = refusal(section(server, pki, auth), **{**texts, **environ})
    assert message in error.message
    assert hint in (error.hint or "")


def test_a_lifetime_that_the_claims_forbid_is_explained(server: str, pki: Pki) -> None:
    with opened(section(server, pki, {"provisioner": "brief"})) as authority:
        with pytest.raises(CAError, match="does not allow certificates for so long") as caught:
            authority.issue_server(ttl=timedelta(hours=1))
        assert "maxTLSCertDuration" in (caught.value.hint or "")
        authority.issue_server(ttl=timedelta(minutes=9))


def test_names_that_the_template_refuses_are_explained(server: str, pki: Pki) -> None:
    error = refusal({**section(server, pki), "name_suffix": "elsewhere.example"})
    assert "step-ca" in error.message
    assert "template" in (error.hint or "")
    with opened(section(server, pki)) as authority, pytest.raises(CAError, match="not a name of a build"):
        authority.issue(Profile.PEER, "spiffe://elsewhere.example/x")


def test_names_that_a_policy_forbids_are_explained(pki: Pki) -> None:
    policy = {"x509": {"allow": {"dns": ["*.elsewhere.example"]}}}
    with serving(pki, policy=policy) as address:
        error = refusal(section(address, pki))
    assert 'dns name "b1.firebuild.internal" not allowed' in error.message
    assert "guest" in (error.hint or "")


def test_a_token_of_another_time_or_for_another_host_is_explained(
    server: str, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(section(server, pki), lambda: now() + timedelta(hours=1))
    assert 'does not accept the token of the provisioner "builds"' in error.message
    assert "compare the clocks" in (error.hint or "")
    monkeypatch.setattr(Client, "audience", lambda *_: "https://elsewhere.example/1.0/sign")
    assert "dnsNames in ca.json" in (refusal(section(server, pki)).hint or "")


def test_a_token_is_for_one_request_and_good_once(
    server: str, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firebuild_pki_step_ca.tokens.secrets.token_hex", lambda _: "again")
    with opened(section(server, pki)) as authority:
        authority.issue_server()
        with pytest.raises(CAError, match="does not accept the token") as refused:
            authority.issue_server()
        assert "twice" in (refused.value.hint or "")


def test_certificates_of_strangers_and_files_that_do_not_fit_are_refused(server: str, pki: Pki) -> None:
    def with_auth(auth: dict[str, Any]) -> dict[str, Any]:
        written = section(server, pki)
        return {**written, "step-ca": {**written["step-ca"], "auth": auth}}

    error = refusal(with_auth(x5c(pki, "strange-client")))
    assert 'the token of the provisioner "certified"' in error.message
    mixed = {**x5c(pki), "key_file": str(pki.strange_client_key)}
    error = refusal(with_auth(mixed))
    assert "does not fit the first certificate" in error.message
    assert f"openssl pkey -in {pki.strange_client_key} -pubout" in (error.hint or "")
    missing = {**x5c(pki), "cert_file": "/nonexistent/c.pem"}
    assert "cannot read /nonexistent/c.pem" in refusal(with_auth(missing)).message
    for setting in ("cert_file", "key_file"):
        endless = {**x5c(pki), setting: "/dev/zero"}
        message = f"auth.{setting}: cannot read /dev/zero: it has more than"
        assert message in refusal(with_auth(endless)).message
    swapped = {**x5c(pki), "cert_file": str(pki.client_key)}
    assert "expected certificates in PEM" in refusal(with_auth(swapped)).message
    error = refusal(with_auth(x5c(pki, "locked-client")))
    assert "needs its passphrase" in error.message
    assert error.hint == "give it by {env: NAME} or {file: PATH}"
    written = with_auth({**x5c(pki), "provisioner": "builds"})
    assert 'no X5C provisioner "builds"' in refusal(written).message


def test_the_server_is_verified_always(server: str, pki: Pki, tmp_path: Path) -> None:
    written = section(server, pki)
    written["step-ca"]["root"] = str(pki.stranger)
    error = refusal(written)
    assert "root has to be the root certificate of this step-ca" in (error.hint or "")
    written["step-ca"]["root"] = str(tmp_path / "missing.pem")
    assert "root" in refusal(written).message


def test_what_was_revoked_is_in_the_database_and_once_is_enough(server: str, pki: Pki) -> None:
    with opened(section(server, pki)) as authority:
        material = authority.issue_server()
        authority.revoke(material)
        authority.revoke(material)


def test_the_check_looks_at_everything_and_issues_nothing(server: str, pki: Pki) -> None:
    provider = bare(section(server, pki))
    provider.open()
    notes = provider.check()
    provider.close()
    assert [note.about for note in notes] == ["reachable", "ca", "clock", "provisioner"]
    assert {note.level for note in notes} == {NoteLevel.OK}
    late = bare(section(server, pki, {"provisioner": "brief"}), clock=lambda: now() + timedelta(hours=1))
    late.open()
    warnings = {note.about: note for note in late.check()}
    assert warnings["clock"].level is NoteLevel.WARNING
    assert "for up to 10m" in warnings["provisioner"].message


def test_a_server_that_went_away_is_a_note_of_the_check(server: str, pki: Pki) -> None:
    provider = bare(section(server, pki))
    provider.open()
    assert provider._client is not None
    provider._client._http.address = "https://127.0.0.1:1"
    (note,) = provider.check()
    assert (note.about, note.level) == ("reachable", NoteLevel.FATAL)


def test_keys_of_all_kinds_sign_tokens(pki: Pki) -> None:
    keys: dict[str, Any] = {
        "ES384": ec.generate_private_key(ec.SECP384R1()),
        "RS256": rsa.generate_private_key(65537, 2048),
    }
    for algorithm, key in keys.items():
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        kind: Any = {"R": RSAKey, "E": ECKey}[algorithm[0]]
        known = [{"key": {**kind.import_key(pem).as_dict(private=False), "kid": "k"}}]
        auth = JWKAuth.model_validate({"method": "jwk", "provisioner": "p", "key": {"env": "K"}})
        signer = tokens.jwk_signer(auth, known, {"K": pem})
        assert signer.algorithm == algorithm
        assert signer.token("https://h/1.0/sign", "s", now().timestamp()).count(".") == 2


@pytest.mark.parametrize(
    "address",
    ["http://ca.example", "ca.example", "https://", "https://me@h", "https://h/path", "https://h:x"],
)
def test_an_address_is_an_https_url(pki: Pki, address: str) -> None:
    with pytest.raises(SettingsError, match=r"ca\.step-ca\.address: expected the https URL"):
        opened(section(address, pki))


def test_a_certificate_with_an_rsa_key_signs_tokens(pki: Pki, tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "own-key.pem").write_bytes(pem)
    issuer = Issuer(leaf_of(pki.ca.read_bytes()), generate_key())
    valid = Validity.starting(now(), timedelta(hours=1), backdate=timedelta(0))
    leaf = make_leaf(key.public_key(), issuer, valid, profile=Profile.GUEST, dns_names=("b.example",))
    (tmp_path / "own.pem").write_bytes(to_pem([leaf]))
    auth = X5CAuth.model_validate(x5c(Pki(tmp_path, pki.jwk, pki.jwk), "own"))
    signer = tokens.x5c_signer(auth, {})
    assert (signer.algorithm, signer.fragment, len(signer.header["x5c"])) == ("RS256", "#x5c/certified", 1)
    for file in ("own.pem", "own-key.pem"):  # as openssl pkcs12 writes it
        named = "\ufefffriendlyName: Größe\n".encode() + (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(named)
    assert tokens.x5c_signer(auth, {}).header == signer.header
    (tmp_path / "own-key.pem").write_bytes(b"\xff")
    with pytest.raises(CAError, match="expected PEM in "):
        tokens.x5c_signer(auth, {})


def test_keys_of_kinds_that_sign_no_tokens_are_refused(pki: Pki) -> None:
    auth = JWKAuth.model_validate({"method": "jwk", "provisioner": "p", "key": {"env": "K"}})
    other = x448.X448PrivateKey.generate()
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    with pytest.raises(CAError, match="expected an EC, RSA or Ed25519 key"):
        tokens.jwk_signer(auth, [], {"K": pem})
    odd = ec.generate_private_key(ec.SECP256K1())
    odd_pem = odd.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    known = [{"key": ECKey.import_key(odd_pem).as_dict(private=False)}]
    with pytest.raises(CAError, match="keys on the curve secp256k1 are not used here"):
        tokens.jwk_signer(auth, known, {"K": odd_pem})
    weak = {"env": "K"}
    auth = JWKAuth.model_validate({"method": "jwk", "provisioner": "p", "key": weak, "password": weak})
    with pytest.raises(CAError, match="cannot be read"):
        tokens.jwk_signer(auth, [], {"K": encrypt("{}", 10)})


def test_all_mistakes_in_the_settings_are_said_at_once(pki: Pki) -> None:
    written = section("https://h", pki, {"password": None}, timeout="0s", root=None, root_fingerprint="abc")
    written["step-ca"]["attempts"] = 6
    with pytest.raises(SettingsError) as caught:
        opened(written)
    assert [problem.path for problem in caught.value.problems] == [
        "ca.step-ca.root_fingerprint",
        "ca.step-ca.auth.password",
        "ca.step-ca.timeout",
        "ca.step-ca.attempts",
    ]


def answer(status: int, body: object) -> HTTPAnswer:
    return HTTPAnswer(status, {}, json.dumps(body).encode() if not isinstance(body, bytes) else body)


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ('dns name "a.example" not allowed', "a name policy of step-ca does not allow these names"),
        (
            "certificate request does not contain the valid DNS names - got [a]",
            "not those that the provisioner",
        ),
        ("requested duration of 1s is less than the authorized minimum", "for so short a time"),
        ("out of order", "the certificate was refused"),
    ],
)
def test_the_words_of_the_server_decide_the_hint(said: str, part: str) -> None:
    error = Refused(answer(403, {"status": 403, "message": said}), "the certificate", "builds")
    assert part in error.message
    assert said in error.message
    assert error.hint


def test_what_is_no_step_ca_is_said(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StepCASettings.model_validate(section("https://127.0.0.1:1", pki)["step-ca"])
    client = Client(settings, ProviderContext(now, {}))
    answers: dict[str, HTTPAnswer] = {}
    monkeypatch.setattr(
        client._http, "request", lambda _method, path, *_, **__: answers[path.partition("?")[0]]
    )
    answers["/roots"] = answer(200, b"<html>")
    with pytest.raises(CAError, match="names no root"):
        client.roots()
    answers["/roots"] = answer(200, {"crts": ["PEM"]})
    answers["/intermediates"] = answer(404, b"")
    assert client.roots().intermediates_pem == b""
    answers["/provisioners"] = answer(200, [])
    with pytest.raises(CAError, match="expected the provisioners of a step-ca"):
        list(client.provisioners())
    answers["/provisioners"] = answer(200, {"provisioners": [{"name": "a"}], "nextCursor": "again"})
    with pytest.raises(CAError, match="expected the provisioners of a step-ca"):
        list(client.provisioners())
    answers["/1.0/sign"] = answer(201, {"crt": "x"})
    with pytest.raises(CAError, match="expected a chain of certificates"):
        client.sign(b"csr", "token", 60)
    answers["/1.0/sign"] = answer(503, b"busy")
    with pytest.raises(Refused) as caught:
        client.sign(b"csr", "token", 60)
    assert caught.value.retryable


@pytest.mark.parametrize(("patient", "attempts"), [(True, 3), (False, 1)])
def test_who_waits_for_a_verdict_has_it_after_one_attempt(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, patient: bool, attempts: int
) -> None:
    made: list[str] = []
    settings = StepCASettings.model_validate(section("https://127.0.0.1:1", pki, attempts=3)["step-ca"])
    client = Client(settings, ProviderContext(now, {}, patient=patient))
    attempt = client._http._attempt
    monkeypatch.setattr(client._http, "_pause", lambda _: None)

    def counted(*given: Any) -> object:
        made.append(given[1])
        return attempt(*given)

    monkeypatch.setattr(client._http, "_attempt", counted)
    with pytest.raises(CAError, match="connection refused"):
        client.roots()
    assert made == ["/roots"] * attempts


def test_errors_are_words_and_no_dumps(server: str, pki: Pki) -> None:
    error = refusal(section(server, pki), PASSWORD="wrong")
    assert not re.search(r"\n|Traceback|eyJ", str(error))
    assert isinstance(now(), datetime)
