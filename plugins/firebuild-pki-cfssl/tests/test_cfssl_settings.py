"""What is said about the settings before anything is asked of a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from firebuild_pki import (
    CASettings,
    Document,
    SettingsError,
    ca_json_schema,
    open_authority,
    redacted,
    validate,
)

from cfssl_servers import KEY, Pki, opened, section
from stub_server import Stub, success


def problems(address: str = "https://127.0.0.1:1", **block: Any) -> list[tuple[str, str]]:
    with pytest.raises(SettingsError) as caught:
        opened(address, **block)
    return [(problem.path, problem.message) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "address", ["cfssl.example", "ftp://h", "https://", "https://[", "https://h:x", "https://h:0"]
)
def test_an_address_is_a_url(address: str) -> None:
    settings = section("https://replaced")
    settings["cfssl"]["address"] = address
    with pytest.raises(SettingsError, match=r"ca\.cfssl\.address: expected a URL such as https://"):
        open_authority(settings)


@pytest.mark.parametrize("address", ["https://me@h", "https://:pw@h", "https://h?q", "https://h#f"])
def test_an_address_has_neither_user_nor_query(address: str) -> None:
    ((path, message),) = problems(address=address)
    assert path == "ca.cfssl.address"
    assert message.startswith("expected a URL")
    assert "pw" not in message


@pytest.mark.parametrize("host", ["cfssl.example", "10.0.0.1", "0.0.0.0", "[2001:db8::1]"])
def test_plain_http_is_for_loopback_only(host: str) -> None:
    ((path, message),) = problems(address=f"http://{host}:8888")
    assert path == "ca.cfssl.address"
    assert message == f"plain http to {host.strip('[]')}; it is accepted on loopback only"


@pytest.mark.needs("cfssl")
def test_localhost_is_loopback(stub: Stub, pki: Pki) -> None:
    stub.answers = [success(certificate=pki.ca.read_text())]
    opened(stub.address.replace("127.0.0.1", "localhost")).close()


def test_certificate_and_key_belong_together() -> None:
    expected = "client_cert and client_key belong together, and one is missing"
    assert problems(client_cert="c.pem") == [("ca.cfssl.client_key", expected)]
    assert problems(client_key="k.pem") == [("ca.cfssl.client_cert", expected)]


def test_all_mistakes_are_said_at_once() -> None:
    found = problems(timeout="0s", attempts=6, guest_profile="firebuild-server")
    assert found == [
        ("ca.cfssl.timeout", "expected a duration above zero"),
        ("ca.cfssl.attempts", "expected a number from 1 to 5, found 6"),
        ("ca.cfssl.guest_profile", "expected another profile than server_profile"),
    ]


def test_missing_settings_are_named_with_their_path() -> None:
    paths = {"address", "auth_key", "server_profile", "guest_profile"}
    with pytest.raises(SettingsError) as caught:
        open_authority({"provider": "cfssl"})
    assert {problem.path for problem in caught.value.problems} == {f"ca.cfssl.{name}" for name in paths}


def test_a_key_in_the_settings_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        opened("https://127.0.0.1:1", auth_key=KEY)
    assert "expected a reference to a secret" in str(caught.value)
    assert KEY not in str(caught.value)


def test_the_settings_are_shown_without_the_key() -> None:
    settings = validate(CASettings, Document({"ca": section("h")}), at="ca")
    assert redacted(settings)["cfssl"]["auth_key"] == {"env": "CFSSL_KEY"}


def test_every_setting_is_described() -> None:
    schema = ca_json_schema()["properties"]["cfssl"]
    assert isinstance(schema, Mapping)
    assert all(setting.get("description") for setting in schema["properties"].values())
