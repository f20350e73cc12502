"""Keys that stay in their store: what the framework makes of them, and of stores that answer badly."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

from firebuild_pki import (
    CAError,
    CASettings,
    KeyStoreContext,
    KeyStoreSpec,
    PluginCatalog,
    ProviderConflict,
    ProviderContext,
    ProviderLoadError,
    SecretRef,
    SettingsError,
    SignatureAlgorithm,
    StoredKey,
    check_settings,
    ecdsa_der,
    hookimpl,
    open_authority,
    open_key,
    validate,
)
from firebuild_pki.conformance import KeyStoreConformance
from firebuild_pki.documents import Document
from firebuild_pki.keystores import OpenKey, check_key_uri, scheme_of
from firebuild_pki.provider import utc_now
from firebuild_pki.x509 import Validity, make_root, to_pem

SECRET = "open-sesame-99"
KEYS: Mapping[str, Any] = {
    "p256": ec.generate_private_key(ec.SECP256R1()),
    "p384": ec.generate_private_key(ec.SECP384R1()),
    "rsa": rsa.generate_private_key(65537, 2048),
    "small": rsa.generate_private_key(65537, 1024),
    "ed25519": ed25519.Ed25519PrivateKey.generate(),
}


@dataclass
class Vault(StoredKey):
    """A store in memory: `mem:NAME`."""

    key: Any
    faults: dict[str, Any] = field(default_factory=dict)
    closed: bool = False

    def public_key(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._faulty("public", self.key.public_key().public_bytes(serialization.Encoding.PEM, form))

    def sign(self, message: bytes, algorithm: SignatureAlgorithm) -> bytes:
        if self.closed:
            raise CAError("the key is closed")
        hashed = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384()}[algorithm.hash_name]
        rest = (padding.PKCS1v15(), hashed) if "rsa" in algorithm else (ec.ECDSA(hashed),)
        return self._faulty("signature", self.key.sign(message, *rest))

    def close(self) -> None:
        self.closed = True
        self._faulty("close", b"")

    def _faulty(self, what: str, right: bytes) -> bytes:
        wrong = self.faults.get(what, right)
        if isinstance(wrong, Exception):
            raise wrong
        return cast(bytes, wrong)  # or what a bad store takes for it


class Store:
    """The plugin of that store."""

    def __init__(self) -> None:
        self.opened: list[Vault] = []
        self.faults: dict[str, Any] = {}

    def open_key(self, uri: str, context: KeyStoreContext) -> StoredKey:
        name = uri.removeprefix("mem:")
        if name not in KEYS:
            raise CAError(f"there is no key {name}", hint=f"there are {', '.join(KEYS)}")
        if context.secret is not None and context.secret() != SECRET:
            raise CAError("the secret is wrong", hint="correct it")
        if (instead := self.faults.get("open")) is not None:
            return cast(StoredKey, instead())
        self.opened.append(Vault(KEYS[name], self.faults))
        return self.opened[-1]

    def plugin(self, *specs: object) -> PluginCatalog:
        made = specs or (KeyStoreSpec("mem", self.open_key, "memory"),)

        @hookimpl
        def register_key_stores() -> Any:
            return list(made)

        return catalog(types.SimpleNamespace(register_key_stores=register_key_stores))


class Found(EntryPoint):
    """An entry point whose plugin is an object at hand."""

    def load(self) -> Any:
        return PLUGINS[self.value]


PLUGINS: dict[str, object] = {}


def catalog(*plugins: object) -> PluginCatalog:
    for plugin in plugins:
        PLUGINS[f"plugin{id(plugin)}"] = plugin
    found = [Found("mem", f"plugin{id(plugin)}", "firebuild_pki.key_stores") for plugin in plugins]
    return PluginCatalog(key_stores=found)


@pytest.fixture
def store() -> Iterator[Store]:
    yield Store()
    PLUGINS.clear()


def context(store: Store) -> ProviderContext:
    return ProviderContext(utc_now, {"SECRET": SECRET}, key_store=store.plugin().load_key_store)


def opened(store: Store, uri: str = "mem:p256") -> OpenKey:
    return open_key(uri, SecretRef(env="SECRET"), context(store))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CAError) as refused:
        call()
    return str(refused.value)


class TestMemory(KeyStoreConformance):
    @pytest.fixture
    def key_uri(self) -> str:
        return "mem:p384"

    @pytest.fixture
    def other_uri(self) -> str:
        return "mem:rsa"

    @pytest.fixture
    def missing_uri(self) -> str:
        return "mem:nothing"

    @pytest.fixture
    def key_secret(self) -> SecretRef:
        return SecretRef(env="SECRET")

    @pytest.fixture
    def wrong_secret(self) -> str:
        return "wrong-one-5"

    @pytest.fixture
    def key_environ(self) -> Mapping[str, str]:
        return {"SECRET": SECRET}

    @pytest.fixture
    def key_catalog(self, store: Store) -> PluginCatalog:
        return store.plugin()


@pytest.mark.parametrize("scheme", ["mem", "MEM", "Mem"])
def test_the_scheme_of_a_uri_is_written_in_any_case(store: Store, scheme: str) -> None:
    """RFC 3986 section 3.1; the store sees it in lower case."""
    key = opened(store, f"{scheme}:p256")
    assert (str(key.uri), len(store.opened)) == (f"{scheme}:p256", 1)
    assert scheme_of(f"{scheme}:p256") == "mem"
    assert scheme_of("C:/keys/ca.pem") is None


def test_what_can_be_said_of_a_uri_is_said_before_the_store_is_opened(store: Store) -> None:
    def check(uri: str) -> None:
        if uri != "mem:p256":
            raise CAError("there is no such key", hint="mem:p256 is there")

    spec = KeyStoreSpec("mem", store.open_key, "memory", check_uri=check)
    around = ProviderContext(utc_now, {}, key_store=store.plugin(spec).load_key_store)
    check_key_uri("MEM:p256", around)
    expected = "mem:other: there is no such key (hint: mem:p256 is there)"
    assert refusal(lambda: check_key_uri("mem:other", around)) == expected
    document = Document({"ca": {"provider": "file", "file": {"ca_cert": "ca.pem", "ca_key": "mem:other"}}})
    settings = validate(CASettings, document, at="ca", context={"catalog": store.plugin(spec)})
    for use in (open_authority, check_settings):
        with pytest.raises(SettingsError, match=r"ca\.file\.ca_key: mem:other: there is no such key"):
            use(settings)
    assert store.opened == []
    with pytest.raises(ProviderLoadError, match="check_uri of its KeyStoreSpec cannot be called"):
        store.plugin(replace(spec, check_uri=cast(Any, 5))).load_key_store("mem")


def test_settings_with_a_key_in_a_store_are_accepted_before_anything_is_opened(store: Store) -> None:
    """`config check` and `ca check` look at them without a build."""
    document = Document({"ca": {"provider": "file", "file": {"ca_cert": "ca.pem", "ca_key": "mem:p256"}}})
    assert check_settings(validate(CASettings, document, at="ca", context={"catalog": store.plugin()})) == ()
    assert store.opened == []


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"public": "text"}, "mem:p256: expected its public key as bytes, found str"),
        ({"public": b"junk"}, "mem:p256: its public key cannot be read (hint: a key store returns"),
        ({"public": KeyError("id")}, "mem:p256: reading the public key failed: KeyError: 'id'"),
        ({"open": lambda: "text"}, "TypeError: open_key must return a StoredKey, found str"),
        ({"signature": None}, "mem:p256: expected a signature of bytes, found NoneType"),
        ({"signature": b"\0" * 70}, "its ecdsa-sha256 signature does not verify with its public key"),
        ({"signature": ConnectionError("away")}, "mem:p256: signing failed: ConnectionError: away"),
        ({"close": OSError("stuck")}, "mem:p256: closing failed: OSError: stuck"),
    ],
)
def test_a_store_that_answers_badly_is_named(store: Store, faults: dict[str, Any], words: str) -> None:
    def use() -> None:
        key = opened(store)
        key.sign(b"text", SignatureAlgorithm.ECDSA_SHA256)
        key.close()

    store.faults = faults
    assert words in refusal(use)
    if "public" in faults:
        assert store.opened[0].closed


def test_only_kinds_of_keys_that_tls_takes_are_opened(store: Store) -> None:
    assert "mem:ed25519: expected an RSA or EC key, found Ed25519" in refusal(
        lambda: opened(store, "mem:ed25519")
    )


def test_a_uri_is_told_from_a_path(store: Store) -> None:
    assert 'no installed key store is called "men"' in refusal(lambda: opened(store, "men:p256"))
    assert 'did you mean "mem"?' in refusal(lambda: opened(store, "men:p256"))
    assert "expected the URI of a key" in refusal(lambda: opened(store, "/etc/ca.key"))
    bare = ProviderContext(utc_now, {})
    assert "there are no key stores here" in refusal(lambda: open_key("mem:p256", None, bare))


@pytest.mark.parametrize(
    "uri",
    [
        "mem:p256?pin-value=8391",
        "mem:pin-value=8391",
        "mem:p256?PIN-Value = 8391",
        "mem:p256?x=1,pin%2Dvalue=8391",
        "mem://user:8391@host/key",
        "mem://user:8391@[host/key",  # not an address
    ],
)
def test_a_secret_in_the_uri_is_refused_and_not_shown(store: Store, uri: str) -> None:
    for said in (
        refusal(lambda: opened(store, uri)),
        refusal(lambda: section(store, "ca.pem", uri)),
    ):
        assert "holds a secret itself (not shown)" in said
        assert "8391" not in said


def test_the_private_key_does_not_leave_its_store(store: Store) -> None:
    for name in ("p256", "rsa"):
        key = opened(store, f"mem:{name}").key
        with pytest.raises(UnsupportedAlgorithm, match="does not leave its store"):
            key.private_numbers()
    elliptic, modular = opened(store).key, opened(store, "mem:rsa").key
    assert isinstance(elliptic, ec.EllipticCurvePrivateKey)
    assert isinstance(modular, rsa.RSAPrivateKey)
    assert (elliptic.curve.name, elliptic.key_size, modular.key_size) == ("secp256r1", 256, 2048)
    digested = utils.Prehashed(hashes.SHA256())
    with pytest.raises(UnsupportedAlgorithm, match="signs messages"):
        elliptic.sign(b"\0" * 32, ec.ECDSA(digested))
    with pytest.raises(UnsupportedAlgorithm, match="signs messages"):
        modular.sign(b"\0" * 32, padding.PKCS1v15(), digested)


def test_pairs_of_numbers_become_der() -> None:
    assert ecdsa_der(b"\x01\x02") == bytes.fromhex("3006020101020102")
    for wrong in (b"", b"\x01"):
        with pytest.raises(ValueError, match="two numbers of the same length"):
            ecdsa_der(wrong)


def section(store: Store, certificate: str, uri: str, **more: object) -> CASettings:
    block = {"ca_cert": certificate, "ca_key": uri, "ca_key_passphrase": {"env": "SECRET"}, **more}
    document = Document({"ca": {"provider": "file", "file": block}})
    return validate(CASettings, document, at="ca", context={"catalog": whole(store)})


def whole(store: Store) -> PluginCatalog:
    return PluginCatalog(key_stores=store.plugin()._key_stores)


def root_of(store: Store, uri: str, place: Path) -> str:
    validity = Validity.starting(utc_now(), timedelta(hours=1), backdate=timedelta(minutes=5))
    place.write_bytes(
        to_pem([make_root(opened(store, uri).key, validity, with_intermediate=False).certificate])
    )
    return str(place)


def test_the_provider_says_where_the_key_is_and_lets_go_of_it(store: Store, tmp_path: Path) -> None:
    certificate = root_of(store, "mem:p384", tmp_path / "ca.pem")
    settings = section(store, certificate, "mem:p384")
    with open_authority(settings, environ={"SECRET": SECRET}) as authority:
        notes = [str(note) for note in authority.check()]
        assert authority.issue_server().server_name
    assert any("the key mem:p384 fits" in note and "it stays in its store" in note for note in notes)
    assert store.opened[-1].closed


def test_a_key_that_does_not_fit_is_closed_again(store: Store, tmp_path: Path) -> None:
    settings = section(store, root_of(store, "mem:p384", tmp_path / "ca.pem"), "mem:p256")
    said = refusal(lambda: open_authority(settings, environ={"SECRET": SECRET}))
    assert "ca_key mem:p256: the key does not fit" in said
    assert "the store has to show the public key that this prints: openssl x509" in said
    assert store.opened[-1].closed


def test_a_weak_key_is_closed_again(store: Store, tmp_path: Path) -> None:
    settings = section(store, root_of(store, "mem:p384", tmp_path / "ca.pem"), "mem:small")
    said = refusal(lambda: open_authority(settings, environ={"SECRET": SECRET}))
    assert "found RSA 1024" in said
    assert store.opened[-1].closed


def test_what_the_store_says_is_told_with_the_setting(store: Store, tmp_path: Path) -> None:
    settings = section(store, root_of(store, "mem:p384", tmp_path / "ca.pem"), "mem:nothing")
    said = refusal(lambda: open_authority(settings, environ={"SECRET": SECRET}))
    assert "ca-provider(file): ca_key mem:nothing: there is no key nothing (hint: there are p256" in said
    settings = section(store, str(tmp_path / "ca.pem"), "mem:p384")
    assert "but it is not set" in refusal(lambda: open_authority(settings, environ={}))


def test_a_plugin_that_registers_badly_is_named(store: Store) -> None:
    good = KeyStoreSpec("mem", store.open_key, "memory")
    for specs, words in (
        ([replace(good, scheme="other")], 'a key store called "mem", found other'),
        ([replace(good, api_version=9)], "version 9 of the contract"),
        ([replace(good, open_key=None)], "open_key of its KeyStoreSpec cannot be called"),  # type: ignore[arg-type]
        ([replace(good, summary=3)], "summary of its KeyStoreSpec is of the wrong type, int"),  # type: ignore[arg-type]
        (["text"], "register_key_stores must return KeyStoreSpec objects, found str"),
    ):
        with pytest.raises(ProviderLoadError) as refused:
            store.plugin(*specs).load_key_store("mem")
        assert words in str(refused.value)
    with pytest.raises(ProviderConflict, match="registers it twice"):
        store.plugin(good, good).load_key_store("mem")


def test_installed_key_stores_are_listed(store: Store) -> None:
    assert [one.name for one in store.plugin().key_stores()] == ["mem"]
    assert "pkcs11" in [one.name for one in PluginCatalog().key_stores()]


def test_a_mistake_in_the_settings_has_its_place(store: Store) -> None:
    with pytest.raises(SettingsError) as refused:
        section(store, "ca.pem", "mem:p256?pin-value=1")
    assert [one.path for one in refused.value.problems] == ["ca.file.ca_key"]
