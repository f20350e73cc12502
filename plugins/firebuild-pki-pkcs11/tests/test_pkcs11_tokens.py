"""Tokens, keys and PINs that are not there, not the only ones, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pkcs11
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key
from firebuild_pki import CAError, KeyStoreContext, SignatureAlgorithm
from pkcs11 import Attribute, KeyType
from pkcs11.util.ec import encode_named_curve_parameters

from firebuild_pki_pkcs11 import tokens as module
from firebuild_pki_pkcs11.tokens import TokenKey, open_token_key
from softhsm import MODULE, PIN, token, uri

pytestmark = [pytest.mark.needs("softhsm2"), pytest.mark.xdist_group("softhsm")]
Opening = Callable[[str], TokenKey]


def refusal(text: str, pin: str | None = PIN, **environ: str) -> str:
    secret = None if pin is None else (lambda: pin)
    with pytest.raises(CAError) as refused:
        open_token_key(text, KeyStoreContext(secret, environ))
    return str(refused.value)


def test_a_token_that_is_not_there_is_told_with_those_that_are(tokens: None) -> None:
    said = refusal(uri("cellar", "p256"))
    assert 'no token is token "cellar"' in said
    assert '"ca"' in said
    assert '"spare"' in said


def test_several_tokens_are_told_apart_by_their_serial_numbers(opening: Opening) -> None:
    said = refusal(f"pkcs11:manufacturer=SoftHSM%20project;object=p256?module-path={MODULE}")
    assert "2 tokens are" in said
    serial = token("spare").serial.decode()
    assert f"(serial {serial})" in said
    opening(f"pkcs11:serial={serial};object=p256?module-path={MODULE}").close()


def test_a_key_that_is_not_there_is_told_with_those_that_are(tokens: None) -> None:
    said = refusal(uri("ca", "nothing"))
    assert 'no private key is object "nothing"' in said
    assert 'object "p384" (id %02)' in said


def test_several_keys_are_told_apart_by_their_ids(opening: Opening) -> None:
    assert "3 private keys are any private key" in refusal(f"pkcs11:token=ca?module-path={MODULE}")
    key = opening(f"pkcs11:token=ca;id=%03?module-path={MODULE}")
    assert key.sign(b"text", SignatureAlgorithm.RSA_SHA256)
    key.close()


def test_a_wrong_pin_is_refused_also_while_the_token_is_open(opening: Opening) -> None:
    assert "the PIN is wrong" in refusal(uri("ca", "p256"), "9999-9999")
    key = opening(uri("ca", "p256"))
    assert "in use in this process with another PIN" in refusal(uri("ca", "p256"), "9999-9999")
    assert key.sign(b"text", SignatureAlgorithm.ECDSA_SHA256)
    key.close()
    assert "the PIN is wrong" in refusal(uri("ca", "p256"), "9999-9999")


def test_a_missing_pin_is_asked_for(tokens: None) -> None:
    assert "needs a PIN (hint: say in ca_key_passphrase" in refusal(uri("ca", "p256"), None)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (pkcs11.PinLocked, "the PIN is locked after too many wrong ones (hint: unlock it"),
        (pkcs11.PinExpired, "the PIN has expired"),
        (pkcs11.TokenNotPresent, "put it in again"),
        (pkcs11.DeviceError, 'logging in to the token "spare" failed: DeviceError'),
    ],
)
def test_a_token_that_refuses_is_told_in_words(
    tokens: None, monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: str
) -> None:
    # SoftHSM never locks a PIN, and can't be taken out
    class Refusing:
        label, flags, slot = "spare", pkcs11.TokenFlag.LOGIN_REQUIRED, token("spare").slot

        def open(self, **_: object) -> None:
            raise error

    monkeypatch.setattr(module, "_token", lambda *_: Refusing())
    assert words in refusal(uri("spare", "p256"))


def test_an_ec_key_without_its_public_half_is_refused(opening: Opening) -> None:
    session = token("spare").open(user_pin=PIN, rw=True)
    curve = {pkcs11.Attribute.EC_PARAMS: pkcs11.util.ec.encode_named_curve_parameters("secp256r1")}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True)
    public, _ = parameters.generate_keypair(store=True, id=b"\x77", label="half")
    public.destroy()
    session.close()
    try:
        assert 'no public key with the id of object "half" (id %77)' in refusal(uri("spare", "half"))
    finally:
        session = token("spare").open(user_pin=PIN, rw=True)
        for key in session.get_objects({pkcs11.Attribute.LABEL: "half"}):
            key.destroy()
        session.close()


def test_of_keys_without_an_id_each_has_its_own_public_half(opening: Opening) -> None:
    session = token("spare").open(user_pin=PIN, rw=True)
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    for label in ("one", "two"):
        parameters = session.create_domain_parameters(KeyType.EC, curve, local=True)
        parameters.generate_keypair(store=True, id=b"", label=label)
    session.close()
    try:
        for label in ("one", "two"):
            key = opening(uri("spare", label))
            public = load_der_public_key(key.public_key())
            assert isinstance(public, ec.EllipticCurvePublicKey)
            signature = key.sign(b"text", SignatureAlgorithm.ECDSA_SHA256)
            public.verify(signature, b"text", ec.ECDSA(hashes.SHA256()))
            key.close()
    finally:
        session = token("spare").open(user_pin=PIN, rw=True)
        for label in ("one", "two"):
            for made in list(session.get_objects({Attribute.LABEL: label})):
                made.destroy()
        session.close()


def test_a_module_of_somebody_else_is_refused(opening: Opening) -> None:
    major, minor = pkcs11.lib(str(Path(MODULE).resolve())).library_version
    opening(uri("ca", "p256", "library-manufacturer=SoftHSM", f"library-version={major}.{minor}")).close()
    said = refusal(uri("ca", "p256", "library-manufacturer=Nobody"))
    assert 'expected a module of library-manufacturer "Nobody", found "SoftHSM"' in said
    assert f'found "{major}.{minor}"' in refusal(uri("ca", "p256", "library-version=99"))


def test_a_module_that_is_not_there_or_not_one_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "module.so"
    text.write_text("not a module")
    assert "there is no such file (hint: name it:" in refusal("pkcs11:token=ca?module-path=/nowhere/x.so")
    assert f"the module {text} cannot be used" in refusal(f"pkcs11:token=ca?module-path={text}")
    assert "expected nothing.so or libnothing.so in" in refusal("pkcs11:token=ca?module-name=nothing")


def test_the_module_may_be_named_by_name_or_by_a_variable(tokens: None) -> None:
    context = KeyStoreContext(lambda: PIN, {"PKCS11_MODULE": MODULE})
    open_token_key("pkcs11:token=ca;object=p256", context).close()
    named = "pkcs11:token=ca;object=p256?module-name=softhsm2"
    open_token_key(named, KeyStoreContext(lambda: PIN)).close()


def test_nothing_is_left_of_a_login_when_the_last_key_is_closed(opening: Opening) -> None:
    keys = [opening(uri("ca", name)) for name in ("p256", "p384", "p256")]
    for key in (keys[1], keys[0], keys[2]):
        assert keys[2].sign(b"text", SignatureAlgorithm.ECDSA_SHA256)
        key.close()
    assert not any(one.logins for one in module._modules.values())
    assert "needs a PIN" in refusal(uri("ca", "p256"), None)


def test_one_key_in_several_threads_signs_well(opening: Opening) -> None:
    key = opening(uri("ca", "p256"))
    made: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: made.append(key.sign(b"text", SignatureAlgorithm.ECDSA_SHA256)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    key.close()
    assert len(set(made)) == 8
