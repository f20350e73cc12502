"""Looking into files: what is in them, and whether it belongs together. OpenSSL made all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)

from firebuild_pki import CAError
from firebuild_pki.preflighting import Inspection, RowLevel, inspect_files, read_bytes, read_file
from pki_file import conftest
from pki_file.operator_files import CA, SERVER, Shop

shop, usual = conftest.shop, conftest.usual


Load = Callable[[bytes, bytes], object]


def _now() -> datetime:
    return datetime.now(UTC)


def inspect(
    *paths: Path, later: float = 0, passphrase: bytes | None = None, trust: Path | None = None
) -> Inspection:
    return inspect_files(
        [read_file(str(path)) for path in paths],
        now=_now() + timedelta(days=later),
        passphrase=passphrase,
        anchors_pem=None if trust is None else trust.read_bytes(),
    )


def wrong(found: Inspection) -> list[tuple[str, str]]:
    return [(row.about, row.message) for row in found.rows if row.level is RowLevel.FATAL]


def said(found: Inspection, level: RowLevel) -> str:
    return "\n".join(f"{row.about}: {row.message}" for row in found.rows if row.level is level)


def test_a_chain_with_its_key_and_its_anchor_is_sound(usual: Shop, shop: Shop) -> None:
    chain = shop.write("chain.pem", usual.read("server.pem", "builds.pem", "policy.pem"))
    found = inspect(chain, usual.path("server.key"), usual.path("root.pem"))
    assert [item.kind for item in found.items] == [*["certificate"] * 3, "private key", "certificate"]
    assert [item.number for item in found.items] == [1, 2, 3, 1, 1]
    assert found.sound
    text = said(found, RowLevel.OK)
    assert 'server use: "' in text
    assert f"key: the key of {usual.path('server.key')} fits" in text
    assert "PRIVATE KEY" not in json.dumps(found.to_json())


def test_what_a_leaf_may_be_used_for_decides_what_is_tried(usual: Shop) -> None:
    found = inspect(*(usual.path(f"{one}.pem") for one in ("client", "builds", "policy", "root")))
    abouts = {row.about for row in found.rows}
    assert "guest use" in abouts
    assert "server use" not in abouts
    assert found.sound


def test_what_a_leaf_is_for_is_shown_where_no_end_of_a_build_is(usual: Shop) -> None:
    usual.issue("signing", "builds", SERVER.replace("serverAuth", "codeSigning"))
    cas = [usual.path(f"{one}.pem") for one in ("builds", "policy", "root")]
    found = inspect(usual.path("signing.pem"), *cas)
    assert found.sound
    assert "is for neither servers nor guests, but for: 1.3.6.1.5.5.7.3.3" in said(found, RowLevel.SKIPPED)
    # which builds refuse
    usual.issue("anything", "builds", SERVER.replace("serverAuth", "anyExtendedKeyUsage"))
    found = inspect(usual.path("anything.pem"), *cas)
    assert [about for about, _ in wrong(found)] == ["server use", "guest use"]


def test_names_and_keys_are_judged_as_builds_judge_them(usual: Shop) -> None:
    cas = [usual.path(f"{one}.pem") for one in ("builds", "policy", "root")]
    named = "subjectAltName=DNS:*.example.com"
    usual.issue("wild", "builds", SERVER.replace("subjectAltName=", f"{named},"))
    assert inspect(usual.path("wild.pem"), *cas).sound
    usual.issue("wilder", "builds", SERVER.replace("subjectAltName=DNS:builds.example.com", named))
    ((about, message),) = wrong(inspect(usual.path("wilder.pem"), *cas))
    assert about == "server use"
    assert "has no DNS name without a wildcard, only *.example.com, among" in message
    usual.key("large", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521")
    usual.issue("large", "builds", SERVER)
    assert [about for about, _ in wrong(inspect(usual.path("large.pem"), *cas))] == ["key", "server use"]
    usual.root("large")  # which a CA may have
    assert inspect(usual.path("large.pem")).sound


def test_a_file_that_was_cut_off_is_named_also_behind_what_is_whole(usual: Shop, shop: Shop) -> None:
    cut = shop.write("cut.pem", usual.read("server.pem"), usual.read("builds.pem")[:300])
    with pytest.raises(CAError, match="found a PEM block without its END line") as refused:
        inspect(cut)
    assert refused.value.hint == "the file was cut off: copy it again"


def test_a_certificate_that_is_understood_in_part_says_which(shop: Shop) -> None:
    # an address with bits of the host, as OpenSSL writes it
    shop.root("odd", extensions=f"{CA}\nnameConstraints=critical,permitted;IP:10.1.2.3/255.0.0.0")
    with pytest.raises(
        CAError, match=r"odd\.pem: certificate 1 in it cannot be read: its extensions: 10\.1\.2"
    ):
        inspect(shop.path("odd.pem"))


def test_an_encryption_that_nobody_knows_is_not_taken_for_a_wrong_passphrase(shop: Shop) -> None:
    shop.key("ca")
    how = ("pkcs8", "-topk8", "-v2", "camellia-256-cbc", "-passout", "pass:open")
    for form in ("PEM", "DER"):
        shop.openssl(*how, "-in", "ca.key", "-outform", form, "-out", "locked.key")
        shop.path("locked.key").chmod(0o600)
        with pytest.raises(CAError, match="cannot be read: Unknown key encryption algorithm") as refused:
            inspect(shop.path("locked.key"), passphrase=b"open")
        assert str(refused.value.hint).startswith("encrypt it again: openssl pkcs8 -topk8"), form


def test_a_missing_link_another_key_and_an_expired_certificate_are_wrong(usual: Shop) -> None:
    found = inspect(usual.path("server.pem"), usual.path("client.key"), usual.path("root.pem"))
    assert not found.sound
    assert [about for about, _ in wrong(found)] == ["key", "server use"]
    assert "missing link" in wrong(found)[1][1]
    found = inspect(usual.path("server.pem"), later=1001)
    assert [about for about, _ in wrong(found)] == ["validity"]
    assert " expired at " in wrong(found)[0][1]
    found = inspect(usual.path("server.pem"), later=-1)
    assert " is not valid before " in wrong(found)[0][1]


def test_without_an_anchor_the_chain_is_not_tried_and_trust_names_one(usual: Shop, shop: Shop) -> None:
    files = [usual.path(f"{name}.pem") for name in ("server", "builds", "policy")]
    assert "chain: no trust anchor among these files" in said(inspect(*files), RowLevel.SKIPPED)
    assert inspect(*files, trust=usual.path("root.pem")).sound
    other = shop.root("other")
    assert [about for about, _ in wrong(inspect(*files, trust=other))] == ["server use"]
    # an anchor that is no CA
    assert [about for about, _ in wrong(inspect(*files, trust=usual.path("server.pem")))] == ["trust"]


def test_a_chain_out_of_order_is_a_warning(usual: Shop, shop: Shop) -> None:
    chain = shop.write("chain.pem", usual.read("policy.pem", "builds.pem", "server.pem", "root.pem"))
    found = inspect(chain)
    assert found.sound
    warnings = said(found, RowLevel.WARNING)
    assert "the certificate of the leaf is not the first one" in warnings
    assert "the chain holds a root" in warnings
    assert "the chain is out of order" in warnings


def test_keys_need_their_passphrase_and_are_nobody_elses(shop: Shop) -> None:
    shop.root("root")
    shop.openssl("pkey", "-in", "root.key", "-aes256", "-passout", "pass:open sesame", "-out", "locked.key")
    locked = shop.path("locked.key")
    locked.chmod(0o644)
    found = inspect(locked, shop.path("root.pem"))
    assert found.sound
    assert "is encrypted: --passphrase-file names its passphrase" in said(found, RowLevel.SKIPPED)
    assert "can be used by every user of this machine" in said(found, RowLevel.WARNING)
    found = inspect(locked, shop.path("root.pem"), passphrase=b"open sesame")
    assert found.items[0].to_json() == {
        "file": str(locked),
        "number": 1,
        "kind": "private key",
        "key": "EC secp256r1",
        "encrypted": True,
    }
    assert "fits" in said(found, RowLevel.OK)
    with pytest.raises(CAError, match="cannot be read: ") as refused:
        inspect(locked, passphrase=b"guess")
    assert refused.value.hint == "the passphrase may be wrong"
    assert "guess" not in str(refused.value)


def test_a_wrong_passphrase_is_told_also_where_its_padding_is_right_by_chance(shop: Shop) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for encoding, form in ((Encoding.PEM, "locked.pem"), (Encoding.DER, "locked.der")):
        data = key.private_bytes(encoding, PrivateFormat.PKCS8, BestAvailableEncryption(b"right"))
        load: Load = load_pem_private_key if encoding is Encoding.PEM else load_der_private_key
        lucky = next(guess for guess in map(b"%d".__mod__, range(20_000)) if misleads(load, data, guess))
        with pytest.raises(CAError, match="cannot be read: ") as refused:
            inspect(shop.write(form, data), passphrase=lucky)
        assert refused.value.hint == "the passphrase may be wrong"


def misleads(load: Load, data: bytes, passphrase: bytes) -> bool:
    try:
        load(data, passphrase)
    except ValueError as error:
        return "password" not in str(error)
    return False


def test_every_form_is_read(usual: Shop, shop: Shop) -> None:
    pem, key = str(usual.path("server.pem")), str(usual.path("server.key"))
    shop.openssl("x509", "-in", pem, "-outform", "DER", "-out", "cert.der")
    shop.openssl("pkey", "-in", key, "-outform", "DER", "-out", "key.der")
    shop.path("key.der").chmod(0o600)
    shop.openssl("crl2pkcs7", "-nocrl", "-certfile", pem, "-out", "chain.p7b")
    shop.openssl("crl2pkcs7", "-nocrl", "-certfile", pem, "-outform", "DER", "-out", "chain.p7c")
    shop.openssl("pkcs12", "-export", "-in", pem, "-inkey", key, "-passout", "pass:p12", "-out", "pair.p12")
    shop.path("pair.p12").chmod(0o600)
    shop.request("asked")
    shop.openssl("req", "-in", "asked.csr", "-outform", "DER", "-out", "asked.der")
    kinds = {
        "cert.der": ["certificate"],
        "key.der": ["private key"],
        "chain.p7b": ["certificate"],
        "chain.p7c": ["certificate"],
        "pair.p12": ["private key", "certificate"],
        "asked.csr": ["certificate signing request"],
        "asked.der": ["certificate signing request"],
    }
    for name, expected in kinds.items():
        found = inspect(shop.path(name), passphrase=b"p12")
        assert [item.kind for item in found.items] == expected, name
        assert found.sound, name
    with pytest.raises(CAError, match="cannot be read") as refused:
        inspect(shop.path("pair.p12"))
    assert "--passphrase-file" in (refused.value.hint or "")


def test_requests_and_revocation_lists_are_told(shop: Shop) -> None:
    shop.root("root")
    csr = shop.request("asked", "/CN=asked")
    (item,) = inspect(csr).items
    assert item.to_json() == {
        "file": str(csr),
        "number": 1,
        "kind": "certificate signing request",
        "subject": "CN=asked",
        "names": [],
        "key": "EC secp256r1",
        "proven": True,
    }
    shop.write("index.txt", "")
    shop.write(
        "ca.cnf", "[ca]\ndefault_ca=own\n[own]\ndatabase=index.txt\ndefault_md=sha256\ndefault_crl_days=9\n"
    )
    shop.openssl(
        *("ca", "-config", "ca.cnf", "-gencrl", "-cert", "root.pem", "-keyfile", "root.key"),
        *("-out", "root.crl"),
    )
    (item,) = inspect(shop.path("root.crl")).items
    facts = item.to_json()
    assert (facts["kind"], facts["revoked"]) == ("revocation list", 0)
    assert facts["issuer"] == "CN=root,O=Operator"
    shop.openssl("crl", "-in", "root.crl", "-outform", "DER", "-out", "root.der")
    assert inspect(shop.path("root.der")).items[0].kind == "revocation list"


def test_a_request_that_somebody_changed_is_not_proven(shop: Shop) -> None:
    shop.request("asked", "/CN=asked")
    shop.openssl("req", "-in", "asked.csr", "-outform", "DER", "-out", "asked.der")
    changed = shop.write("changed.der", shop.read("asked.der").replace(b"asked", b"other"))
    assert [about for about, _ in wrong(inspect(changed))] == ["request"]


def test_what_tls_refuses_is_wrong_whatever_signed_it(shop: Shop) -> None:
    shop.key("weak", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024")
    shop.root("weak")
    assert {about for about, _ in wrong(inspect(shop.path("weak.pem")))} == {"key"}
    shop.root("root")
    shop.issue("below", "root", more=("-sha1",))
    assert {about for about, _ in wrong(inspect(shop.path("below.pem")))} == {"signature"}
    shop.issue("nameless", "root", SERVER.replace("subjectAltName", "#subjectAltName"))
    found = inspect(shop.path("nameless.pem"), shop.path("root.pem"))
    assert "has no DNS name" in wrong(found)[0][1]


def test_the_signature_of_a_root_is_none_that_tls_looks_at(shop: Shop) -> None:
    shop.root("old", more=("-sha1",))
    shop.issue("server", "old", SERVER)
    found = inspect(shop.path("server.pem"), shop.path("old.pem"))
    assert found.sound
    (row,) = (row for row in found.rows if row.about == "signature")
    assert row.level is RowLevel.WARNING
    assert "is signed with SHA-1" in row.message
    assert row.message.endswith("; TLS does not look at the signature of a trust anchor")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"root:x:0:0", "text without any BEGIN line"),
        (b"\0\1\2", "binary data"),
        (b"-----BEGIN CERTIFICATE-----\nMIIB", "a PEM block without its END line"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "a public key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be"),
        (rb"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "ends of lines are written as"),
        (b"", "standard input is empty"),
        (b"x" * (1 << 20) + b"x", "standard input has more than 1048576 bytes"),
    ],
)
def test_anything_else_is_named(data: bytes, found: str) -> None:
    with pytest.raises(CAError, match=found) as refused:
        inspect_files([read_bytes("standard input", data)], now=_now())
    assert "standard input" in refused.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CAError, match="there is no such file"):
        read_file(str(tmp_path / "missing.pem"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CAError, match="found a pipe"):
        read_file(str(tmp_path / "pipe"))


def test_a_ca_that_ends_soon_says_when(shop: Shop) -> None:
    shop.root("root", days=1)
    assert "ends in 0 h " in said(inspect(shop.path("root.pem"), later=23.5 / 24), RowLevel.OK)
