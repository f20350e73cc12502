"""Private keys: every form in which `openssl` writes them, passphrases, and who can read the file."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

import pytest

from firebuild_pki import CAError, SecretError
from firebuild_pki.pem_files import Block, Content, Source, open_to
from firebuild_pki.providers.file.certificates import load_key
from firebuild_pki.settings import SecretRef
from pki_file.operator_files import Shop, opened

pytestmark = pytest.mark.needs("openssl")

SECRET = "correct horse"
WRONG = "wrong battery"
ENVIRON = {"CA_PASSPHRASE": SECRET}
BY_ENV = {"env": "CA_PASSPHRASE"}
GIVEN = ("-passout", f"pass:{SECRET}")

PLAIN = {
    "PKCS#8": ("pkcs8", "-topk8", "-nocrypt", "-in", "{key}"),
    "SEC1": ("ec", "-in", "{key}"),
    "PKCS#1": ("rsa", "-traditional", "-in", "{key}"),
}
ENCRYPTED = {
    "PKCS#8 with AES": ("pkcs8", "-topk8", "-v2", "aes-256-cbc", "-in", "{key}", *GIVEN),
    "PKCS#8 with scrypt": ("pkcs8", "-topk8", "-scrypt", "-scrypt_N", "1024", "-in", "{key}", *GIVEN),
    "PKCS#8 with 3DES": ("pkcs8", "-topk8", "-v1", "PBE-SHA1-3DES", "-in", "{key}", *GIVEN),
    "SEC1 with AES": ("ec", "-aes256", "-in", "{key}", *GIVEN),
    "PKCS#1 with 3DES": ("rsa", "-traditional", "-des3", "-in", "{key}", *GIVEN),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """An EC and an RSA CA, and their keys in all forms; not to be changed."""
    shop = Shop(tmp_path_factory.mktemp("keys"))
    shop.key("rsa", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    for name in ("rsa", "ec"):
        shop.root(name)
    for form, command in {**PLAIN, **ENCRYPTED}.items():
        source = f"{kind_of(form)}.key"
        shop.write(form, shop.openssl(*(part.replace("{key}", source) for part in command)))
    return shop


def kind_of(form: str) -> str:
    return "rsa" if "PKCS#1" in form else "ec"


@pytest.mark.parametrize("form", PLAIN)
def test_a_plain_key_in_every_form_signs(form: str, keys: Shop) -> None:
    with opened(ca_cert=keys.path(f"{kind_of(form)}.pem"), ca_key=keys.path(form)) as authority:
        assert authority.issue_server()


@pytest.mark.parametrize("form", ENCRYPTED)
@pytest.mark.parametrize("where", ["env", "file"])
def test_an_encrypted_key_in_every_form_signs(form: str, where: str, keys: Shop, shop: Shop) -> None:
    reference = BY_ENV if where == "env" else {"file": str(shop.write("passphrase", SECRET, "\n"))}
    block = {"ca_cert": keys.path(f"{kind_of(form)}.pem"), "ca_key": keys.path(form)}
    with opened(block, ca_key_passphrase=reference, environ=ENVIRON) as authority:
        assert authority.issue_server()


@pytest.mark.parametrize("form", ENCRYPTED)
def test_a_wrong_passphrase_is_called_wrong(form: str, keys: Shop) -> None:
    block = {"ca_cert": keys.path(f"{kind_of(form)}.pem"), "ca_key": keys.path(form)}
    with pytest.raises(CAError) as caught:
        opened(block, ca_key_passphrase=BY_ENV, environ={"CA_PASSPHRASE": WRONG})
    where = f"ca_key {keys.path(form)}"
    assert caught.value.message == f"{where}: ca_key_passphrase does not decrypt the key"
    assert_silent(caught.value, WRONG, keys.read(form))


@pytest.mark.parametrize("form", ENCRYPTED)
def test_a_missing_passphrase_is_asked_for(form: str, keys: Shop) -> None:
    with pytest.raises(CAError) as caught:
        opened(ca_cert=keys.path(f"{kind_of(form)}.pem"), ca_key=keys.path(form))
    assert caught.value.message.endswith("the key is encrypted, and there is no passphrase for it")
    assert caught.value.hint == "set ca_key_passphrase to {env: NAME} or {file: PATH}"


def test_a_passphrase_that_cannot_be_fetched_names_its_setting(keys: Shop) -> None:
    block = {"ca_cert": keys.path("ec.pem"), "ca_key": keys.path("SEC1 with AES")}
    with pytest.raises(SecretError, match="ca_key_passphrase: expected a secret in the environment variable"):
        opened(block, ca_key_passphrase=BY_ENV, environ={})


def test_a_passphrase_for_a_plain_key_is_not_even_fetched(keys: Shop) -> None:
    block = {"ca_cert": keys.path("ec.pem"), "ca_key": keys.path("SEC1")}
    with opened(block, ca_key_passphrase=BY_ENV, environ={}) as authority:
        assert authority.issue_server()


def test_a_key_behind_its_curve_parameters_is_found(shop: Shop) -> None:
    shop.write("ca.key", shop.openssl("ecparam", "-name", "prime256v1", "-genkey"))
    assert shop.read("ca.key").startswith(b"-----BEGIN EC PARAMETERS-----")
    shop.root("ca")
    with opened(ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key")) as authority:
        assert authority.issue_server()


UNFIT = {
    "Ed25519": (("-algorithm", "ed25519"), "found Ed25519"),
    "Ed448": (("-algorithm", "ed448"), "found Ed448"),
    "a short RSA key": (("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"), "found RSA 1024"),
    "another curve": (("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"), "found EC secp256k1"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_keys_that_grpc_or_path_validation_refuse_are_refused(kind: str, shop: Shop) -> None:
    arguments, found = UNFIT[kind]
    shop.key("ca", *arguments)
    shop.root("ca")
    with pytest.raises(CAError) as caught:
        opened(ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key"))
    assert caught.value.message == (
        f"ca_key {shop.path('ca.key')}: expected an RSA key of 2048 bits or more, "
        f"or an EC key on P-256 or P-384 or P-521, or ML-DSA, {found}"
    )


def test_a_key_for_rsa_pss_only_is_refused(shop: Shop) -> None:
    shop.key("ca", "-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048")
    shop.root("ca")
    with pytest.raises(CAError, match=r"ca\.pem: the key of .* is for RSA-PSS only, which gRPC cannot use"):
        opened(ca_cert=shop.path("ca.pem"), ca_key=shop.path("ca.key"))


def test_a_cipher_that_nobody_knows_is_named_with_the_way_out(keys: Shop, shop: Shop) -> None:
    shop.write("ca.key", keys.read("SEC1 with AES").replace(b"AES-256-CBC", b"CAMELLIA-256-CBC"))
    refused = pytest.raises(
        CAError, match=r"encrypted in an unknown way \(hint: encrypt it again: openssl pkcs8 -topk8"
    )
    with refused:
        opened(
            ca_cert=keys.path("ec.pem"),
            ca_key=shop.path("ca.key"),
            ca_key_passphrase=BY_ENV,
            environ=ENVIRON,
        )


def test_an_encryption_that_nobody_knows_is_named_with_the_way_out(keys: Shop, shop: Shop) -> None:
    der = shop.openssl(
        *("pkcs8", "-topk8", "-v2", "aes-256-cbc", "-outform", "DER", *GIVEN),
        given=keys.read("ec.key"),
    )
    oid, strange = bytes.fromhex("2a864886f70d01050d"), bytes.fromhex("2a864886f70d01057f")
    assert oid in der
    shop.write("strange.der", der.replace(oid, strange))
    pem = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n%s-----END ENCRYPTED PRIVATE KEY-----\n"
    shop.write("ca.key", pem % shop.openssl("base64", "-in", "strange.der"))
    with pytest.raises(CAError, match="encrypted in an unknown way"):
        load_key(Source("ca_key", str(shop.path("ca.key"))), SecretRef(env="CA_PASSPHRASE"), ENVIRON)


def test_a_damaged_key_is_called_damaged(keys: Shop, shop: Shop) -> None:
    lines = keys.read("PKCS#8").splitlines(keepends=True)
    shop.write("ca.key", lines[0], lines[1][:20], "\n", lines[-1])
    with pytest.raises(CAError) as caught:
        opened(ca_cert=keys.path("ec.pem"), ca_key=shop.path("ca.key"))
    assert "the private key in it is damaged" in caught.value.message
    assert_silent(caught.value, lines[1].decode()[:20])


def test_two_keys_in_one_file_are_one_too_many(keys: Shop, shop: Shop) -> None:
    shop.write("ca.key", keys.read("PKCS#8", "SEC1"))
    with pytest.raises(CAError, match="expected one private key, found 2"):
        opened(ca_cert=keys.path("ec.pem"), ca_key=shop.path("ca.key"))


def test_no_secret_shows_anywhere(keys: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    block = {"ca_cert": keys.path("ec.pem"), "ca_key": keys.path("SEC1 with AES")}
    with opened(block, ca_key_passphrase=BY_ENV, environ=ENVIRON) as authority:
        authority.issue_server()
        shown = [repr(authority), str(authority.check()), *authority.warnings, caplog.text]
    loaded = load_key(
        Source("ca_key", str(keys.path("SEC1 with AES"))), SecretRef(env="CA_PASSPHRASE"), ENVIRON
    )
    assert repr(loaded) == f"LoadedKey('ca_key {keys.path('SEC1 with AES')}', 'EC P-256')"
    assert repr(Block("PRIVATE KEY", b"secret")) == "Block('PRIVATE KEY')"
    assert "secret" not in repr(Content(loaded.source, b"secret", 0o600, 0))
    assert not [text for text in shown if SECRET in text or "PRIVATE" in text]


def assert_silent(error: CAError, *secrets: str | bytes) -> None:
    text = "".join(traceback.format_exception(error))
    for secret in secrets:
        shown = secret if isinstance(secret, str) else secret.decode().splitlines()[-2]
        assert shown not in text


MODES = [
    # mode, owner, user -> who
    (0o600, 1000, 1000, None),
    (0o400, 1000, 1000, None),
    (0o600, 0, 0, None),
    (0o640, 1000, 1000, "by its group"),
    (0o620, 1000, 1000, "by its group"),
    (0o604, 1000, 1000, "by every user of this machine"),
    (0o644, 0, 1000, "by every user of this machine"),
    (0o601, 1000, 1000, "by every user of this machine"),
    (0o440, 0, 1000, None),
    (0o640, 0, 1000, None),
    (0o660, 0, 1000, "by its group"),
    (0o640, 0, 0, "by its group"),
]


@pytest.mark.parametrize(("mode", "owner", "user", "whom"), MODES)
def test_who_else_can_use_a_key(mode: int, owner: int, user: int, whom: str | None) -> None:
    assert open_to(mode, owner, user) == whom


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o666, 0o777])
def test_a_key_that_others_can_read_is_refused_with_the_command(mode: int, keys: Shop, shop: Shop) -> None:
    key = shop.write("the key", keys.read("ec.key"))
    key.chmod(mode)
    with pytest.raises(CAError) as caught:
        opened(ca_cert=keys.path("ec.pem"), ca_key=key)
    assert f"the private key in it can be used by {'its' if mode == 0o640 else 'every'}" in str(caught.value)
    assert f"(mode {mode:04o})" in caught.value.message
    command = str(caught.value.hint)
    assert command == f"chmod {mode & 0o700:o} '{key}'"
    assert os.system(command) == 0
    opened(ca_cert=keys.path("ec.pem"), ca_key=key).close()


def test_the_target_of_a_link_counts(keys: Shop, shop: Shop) -> None:
    key = shop.write("target.key", keys.read("ec.key"))
    link = shop.path("link.key")
    link.symlink_to(key)
    opened(ca_cert=keys.path("ec.pem"), ca_key=link).close()
    key.chmod(0o644)
    with pytest.raises(CAError, match=rf"ca_key {link}: the private key in it can be used by every user"):
        opened(ca_cert=keys.path("ec.pem"), ca_key=link)


def kubernetes_secret(shop: Shop, mode: int, **files: bytes) -> Path:
    """Lay files out as the kubelet does: links to a link to a directory with the date in its name."""
    mount = shop.path("mount")
    data = mount / "..2024_05_17_12_00_00.123456789"
    data.mkdir(parents=True)
    (mount / "..data").symlink_to(data.name)
    for name, content in files.items():
        (data / name).write_bytes(content)
        (data / name).chmod(mode)
        (mount / name).symlink_to(f"..data/{name}")
    return mount


def test_a_secret_of_kubernetes_works_with_the_right_mode(keys: Shop, shop: Shop) -> None:
    mount = kubernetes_secret(shop, 0o400, tls_crt=keys.read("ec.pem"), tls_key=keys.read("ec.key"))
    with opened(ca_cert=mount / "tls_crt", ca_key=mount / "tls_key") as authority:
        assert authority.issue_server()


def test_a_secret_of_kubernetes_with_the_default_mode_is_told_how_to_be_mounted(
    keys: Shop, shop: Shop
) -> None:
    mount = kubernetes_secret(shop, 0o644, tls_crt=keys.read("ec.pem"), tls_key=keys.read("ec.key"))
    with pytest.raises(CAError) as caught:
        opened(ca_cert=mount / "tls_crt", ca_key=mount / "tls_key")
    assert (
        caught.value.hint == "set defaultMode: 0400 for the volume of this secret in the pod's specification"
    )


def test_a_certificate_file_with_a_key_in_it_is_as_private(keys: Shop, shop: Shop) -> None:
    both = shop.write("both.pem", keys.read("ec.pem", "ec.key"))
    both.chmod(0o644)
    with pytest.raises(CAError, match=rf"ca_cert {both}: the private key in it can be used by every"):
        opened(ca_cert=both, ca_key=keys.path("ec.key"))
