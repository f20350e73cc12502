"""What may be written in the block ``ca.vault``."""

from __future__ import annotations

import json
from typing import Any

import pytest

from firebuild_pki import NoteLevel, SettingsError
from firebuild_pki.addresses import is_safe
from firebuild_pki.config import redacted
from firebuild_pki.provider import Note, Profile
from firebuild_pki.providers.vault.settings import VaultSettings, settings_notes
from pki_vault.tools import ca_settings, raises

BLOCK: dict[str, Any] = {
    "address": "https://vault.example:8200",
    "server_role": "server",
    "guest_role": "guest",
    "auth": {"method": "token", "token": {"env": "TOKEN"}},
}


def settings(**changes: Any) -> VaultSettings:
    block = {name: value for name, value in {**BLOCK, **changes}.items() if value is not None}
    found = ca_settings(block).provider_settings
    assert isinstance(found, VaultSettings)
    return found


@pytest.mark.parametrize(
    "address",
    [
        "https://vault.example",
        "https://vault.example:8200/behind/a/path",
        "https://[2001:db8::1]:8200",
        "http://127.0.0.1:8200",
        "http://127.8.9.10",
        "http://[::1]:8200",
        "http://localhost:8200",
    ],
)
def test_https_anywhere_and_http_on_this_machine(address: str) -> None:
    assert settings(address=address).address == (address,)
    assert settings(address=[f"{address}/"]).address == (address,)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://vault.example:8200", 'expected https, found plain http to "vault.example"'),
        ("http://127.0.0.1.example:8200", "found plain http"),
        ("http://localhost.example", "found plain http"),
        ("http://10.0.0.1", "found plain http"),
        ("http://[2001:db8::1]", "found plain http"),
        ("http://0.0.0.0:8200", "found plain http"),
        ("http://[::ffff:10.0.0.1]:8200", "found plain http"),
        ("vault.example:8200", "expected an address such as https://vault.example:8200"),
        ("ftp://vault.example", "expected an address such as"),
        ("https://", "expected an address such as"),
        ("https://vault.example:port", "expected an address such as"),
        ("https://vault.example:99999", "expected an address such as"),
        ("https://vault .example", "expected an address such as"),
        ("https://vault.example/?a=b", 'found "?" or "#"'),
        ("https://vault.example/#a", 'found "?" or "#"'),
        ("https://vault.example:8200/v1", "leave /v1 out: https://vault.example:8200"),
        ("https://vault.example/prefix/v1/", "leave /v1 out: https://vault.example/prefix"),
        ("https://vault.example:8200/ui/", "leave /ui out: https://vault.example:8200"),
    ],
)
def test_other_addresses_are_refused_where_they_are_written(address: str, words: str) -> None:
    with raises(SettingsError, "ca.vault.address: ", words):
        settings(address=address)
    with raises(SettingsError, "ca.vault.address[1]: ", words):
        settings(address=["https://good.example", address])


@pytest.mark.parametrize("address", ["https://me:hunter2@vault.example", "me:hunter2@vault.example"])
def test_a_password_in_an_address_is_refused_and_not_shown(address: str) -> None:
    with raises(SettingsError, "expected an address such as") as caught:
        settings(address=address)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", [[], 5, {"a": "b"}, None])
def test_an_address_is_a_url_or_a_list(address: object) -> None:
    with raises(SettingsError, "ca.vault.address"):
        settings(address=address)


def test_a_token_goes_nowhere_that_is_not_an_address() -> None:
    assert not is_safe("http://[::1")
    assert not is_safe("https:///path")
    assert not is_safe("ftp://localhost")


@pytest.mark.parametrize(
    "mount", ["", "/", "a//b", "../sys", "a/./b", "a?b", "a#b", "a b", "a%2fb", "$(a)", "a\nb"]
)
def test_a_mount_is_a_path(mount: str) -> None:
    for name in ("mount", "namespace"):
        with raises(SettingsError, f"ca.vault.{name}: expected a path such as pki or teams/build/pki"):
            settings(**{name: mount})


def test_slashes_around_a_mount_do_not_count() -> None:
    found = settings(mount="/teams/build/pki/", namespace="org/team/")
    assert (found.mount, found.namespace) == ("teams/build/pki", "org/team")
    assert found.sign_path(Profile.SERVER) == "teams/build/pki/sign/server"


def test_the_issuer_is_part_of_the_path() -> None:
    assert settings(issuer="next").sign_path(Profile.GUEST) == "pki/issuer/next/sign/guest"


@pytest.mark.parametrize("name", ["role", "server_role", "guest_role", "issuer"])
def test_a_role_is_one_segment(name: str) -> None:
    with raises(SettingsError, f"ca.vault.{name}: expected a name without a slash"):
        settings(**{name: "a/b"})


AUTH = [
    ({}, "ca.vault.auth.method: this setting is required"),
    ({"method": "guess"}, "found 'guess'"),
    ({"method": "aprole"}, 'did you mean "approle"?'),
    ({"method": "token"}, "ca.vault.auth.token: this setting is required"),
    ({"method": "token", "token": "s.literal"}, "secrets do not belong in this file"),
    ({"method": "approle", "role_id": {"env": "R"}, "secret_id": "s.literal"}, "found a string (not shown)"),
    ({"method": "approle", "role_id": {"env": "R"}, "secrets_id": {"env": "S"}}, 'did you mean "secret_id"?'),
    ({"method": "approle", "role_id": {"env": "R"}, "mount": "../x"}, "ca.vault.auth.mount: expected a path"),
    ({"method": "jwt"}, "ca.vault.auth.jwt: this setting is required"),
    ({"method": "kubernetes"}, "ca.vault.auth.role: this setting is required"),
    ({"method": "token_file"}, "ca.vault.auth.path: this setting is required"),
]


@pytest.mark.parametrize(("auth", "words"), AUTH)
def test_mistakes_in_auth_are_named_with_their_path(auth: dict[str, Any], words: str) -> None:
    with raises(SettingsError, words) as caught:
        settings(auth=auth)
    assert "s.literal" not in str(caught.value)


def test_each_way_to_log_in_has_options_of_its_own() -> None:
    for auth in (
        {"method": "token", "token": {"env": "T"}},
        {"method": "token_file", "path": "/run/token"},
        {"method": "approle", "mount": "ci/approle", "role_id": {"env": "R"}, "secret_id": {"file": "s"}},
        {"method": "kubernetes", "role": "r"},
        {"method": "jwt", "role": "r", "jwt": {"env": "J"}, "mount": "gitlab"},
        {"method": "cert", "name": "n"},
    ):
        assert settings(auth=auth).auth.method == auth["method"]


def notes(**changes: Any) -> list[Note]:
    return list(settings_notes(settings(**changes)))


def test_good_settings_need_no_word() -> None:
    assert notes() == []


@pytest.mark.parametrize(
    ("changes", "path", "fatal", "words"),
    [
        ({"server_role": None}, "server_role", True, "no role signs the certificate of the server"),
        ({"guest_role": None}, "guest_role", True, "no role signs the certificate of the guest"),
        ({"role": "both"}, "role", False, "it is not used"),
        ({"tls": {"cert_file": "c"}}, "tls.key_file", True, "both cert_file and key_file"),
        ({"tls": {"key_file": "k"}}, "tls.cert_file", True, "both cert_file and key_file"),
        ({"auth": {"method": "cert"}}, "tls.cert_file", True, "required to log in with a certificate"),
        ({"address": "http://localhost", "tls": {"ca_file": "c"}}, "tls", False, "has no use for"),
        ({"address": "https://v.example/v1/pki"}, "address", False, "leave it out: https://v.example;"),
        ({"address": "https://v.example/ui/vault"}, "address", False, "comes before /v1/"),
        ({"retry_for": "60s"}, "retry_for", False, "ca.call_timeout"),
    ],
)
def test_what_does_not_go_together_is_noted(
    changes: dict[str, Any], path: str, fatal: bool, words: str
) -> None:
    (note,) = notes(**changes)
    assert (note.path, note.fatal) == (path, fatal)
    assert words in str(note)
    assert note.level in {NoteLevel.WARNING, NoteLevel.FATAL}


def test_one_role_may_serve_the_end_that_has_none_of_its_own() -> None:
    assert notes(role="both", guest_role=None) == []
    assert settings(role="both", guest_role=None).roles == ("server", "both")


def test_one_role_may_serve_both_ends() -> None:
    assert notes(role="both", server_role=None, guest_role=None) == []
    assert settings(role="both", server_role=None, guest_role=None).roles == ("both",)


def test_settings_are_shown_without_secrets_and_described() -> None:
    shown = json.dumps(redacted(ca_settings(BLOCK)))
    assert "TOKEN" in shown
    schema = VaultSettings.json_schema()
    assert schema["properties"]["address"]["anyOf"][0] == {"type": "string"}
    assert "description" in schema["properties"]["retry_for"]
