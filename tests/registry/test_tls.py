"""Whose CA vouches for a registry, and what is said of a certificate that is refused."""

from __future__ import annotations

import socket
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.events import Event, Notice, Tasks
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.pull import connected
from firebuild_bootstrap.registry.settings import RegistriesSettings
from firebuild_bootstrap.registry.tls import ca_anchors
from firebuild_bootstrap.settings import BuildSettings
from firebuild_pki import CAError, CASettings, Profile, SettingsError
from firebuild_pki.config import Document, validate
from firebuild_pki.providers.vault import nodes
from registry.conftest import Client
from registry.servers import CA, Image, Small, small_registry


def ask(client: Client, host: str, **special: Any) -> str:
    return client.registries(special={host: special}).digest(Reference.parse(f"{host}/web:1"))


def test_a_refused_certificate_names_its_issuer_and_the_setting(small: Small, client: Client) -> None:
    with pytest.raises(RegistryError) as caught:
        ask(client, small.host, ca_file=None)
    assert "its TLS certificate is not accepted: " in caught.value.message
    assert "the issuer CN=firebuild root " in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("set ca_file to the certificate of its issuer CN=firebuild root ")
    assert caught.value.hint.endswith(f", or ca: provider, in registries.hosts of {small.host}")


def test_another_ca_does_not_vouch(small: Small, client: Client, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(RegistryError, match="is missing"):
        ask(client, small.host, ca_file=str(CA.made(tmp_path / "other").certificate))


def test_a_certificate_for_another_name_is_refused(ca: CA, client: Client, tmp_path: Path) -> None:
    other = CA.made(tmp_path, "registry.example")
    with small_registry(other.server_context()) as server, pytest.raises(RegistryError) as caught:
        ask(client, server.host, ca_file=str(other.certificate))
    assert "hostname mismatch" in caught.value.message
    assert caught.value.hint == (
        f"use a name that the certificate has: `openssl s_client -connect {server.host} </dev/null "
        "| openssl x509 -noout -ext subjectAltName`"
    )


def test_the_ca_of_builds_can_vouch(small: Small, client: Client, ca: CA) -> None:
    small.add(Image(), "1")
    block = {"provider": "file", "file": {"ca_cert": str(ca.certificate), "ca_key": str(ca.key)}}
    settings = validate(CASettings, Document({"ca": block}), at="ca")
    told: list[str] = []
    client.anchors = lambda: ca_anchors(settings, check=lambda: None, report=told.append)
    assert ask(client, small.host, ca_file=None, ca="provider")
    with pytest.raises(InputError, match="needs a provider whose CA outlives a build, and this is embedded"):
        ca_anchors(CASettings.model_validate({}), check=lambda: None, report=told.append)
    assert told == []


def test_a_backend_that_is_waited_for_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nodes, "_WORTH_A_WORD", 0)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    vault: dict[str, Any] = {
        "address": f"http://127.0.0.1:{port}",
        "server_role": "s",
        "guest_role": "g",
        "retry_for": "1s",
    }
    token = tmp_path / "token"
    token.write_text("s.token")
    vault["auth"] = {"method": "token", "token": {"file": str(token)}}
    events: list[Event] = []
    settings = validate(BuildSettings, Document({"ca": {"provider": "vault", "vault": vault}}))
    with (
        closing(connected(settings, lambda: None, Tasks(events.append))) as registries,
        pytest.raises(CAError, match=f"127.0.0.1:{port}"),
    ):
        registries.around.anchors()
    [said] = {event.message for event in events if isinstance(event, Notice)}
    assert said.startswith("ca-provider(vault): no usable answer")
    assert f"http://127.0.0.1:{port}" in said


def test_a_client_certificate_is_shown_to_the_registry_and_to_nobody_else(
    mirror: Small, client: Client, ca: CA, tmp_path: Path
) -> None:
    own = CA.made(tmp_path, "client", Profile.GUEST)
    context = ca.server_context()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(own.certificate)
    certificate, key = map(str, own.pair)
    with small_registry(context) as server:
        server.add(Image(), "1")
        with pytest.raises(RegistryError) as caught:
            ask(client, server.host)
        assert caught.value.hint is None or "set cert_file and key_file" in caught.value.hint
        assert ask(client, server.host, cert_file=certificate, key_file=key)


def test_files_that_are_no_use_are_named(small: Small, client: Client, ca: CA, tmp_path: Path) -> None:
    certificate, key = map(str, ca.pair)
    (tmp_path / "open").write_bytes(ca.pair[1].read_bytes())
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "binary").write_bytes(b"\xff")
    for special, why in (
        ({"ca_file": str(tmp_path / "none")}, "No such file"),
        ({"ca_file": key}, "expected PEM certificates in ca_file"),
        ({"ca_file": str(tmp_path / "binary")}, "expected PEM certificates in ca_file"),
        ({"cert_file": certificate, "key_file": str(tmp_path / "open")}, "is open to every user"),
        (
            {"cert_file": certificate, "key_file": str(tmp_path / "none")},
            "cannot read key_file ",
        ),
        ({"cert_file": key, "key_file": key}, "cert_file and key_file cannot be used"),
        (
            {"cert_file": certificate, "key_file": key, "key_passphrase": {"env": "NO_PASSPHRASE"}},
            "registries.hosts of .*: expected a secret in the environment variable NO_PASSPHRASE",
        ),
    ):
        with pytest.raises(InputError, match=why):
            ask(client, small.host, **special)


def test_a_proxy_is_asked_to_connect_and_its_password_is_not_shown(client: Client) -> None:
    with small_registry(None) as proxy:
        for url in (proxy.host, f"http://me:secret-of-the-proxy@{proxy.host}"):
            client.environ["HTTPS_PROXY"] = url
            with pytest.raises(RegistryError) as caught:
                client.registries(attempts=1).digest(Reference.parse("registry.example/web:1"))
            assert "no connection by the proxy of the environment" in caught.value.message
            assert "secret-of-the-proxy" not in str(caught.value)
        client.environ["HTTPS_PROXY"] = "proxy.invalid:3128"
        with pytest.raises(RegistryError, match="proxy of the environment: its name can't be looked up"):
            client.registries(attempts=1).digest(Reference.parse("registry.example/web:1"))
        assert not proxy.requests  # it has refused CONNECT, and got nothing else


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "localhost:abc",
            "in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, found something else",
        ),
        ("http://me:secret-of-the-proxy@localhost:99999", "found something else"),
        ("http://[::1", "found something else"),
        ("http://a b:1", "found something else"),
        ("socks5://localhost:1080", "found the scheme socks5"),
    ],
)
def test_what_is_no_address_of_a_proxy_is_told_at_once(client: Client, url: str, why: str) -> None:
    client.environ["HTTPS_PROXY"] = url
    with pytest.raises(RegistryError, match=why) as caught:
        client.registries().digest(Reference.parse("registry.example/web:1"))
    assert "secret-of-the-proxy" not in str(caught.value)
    assert not client.pauses


@pytest.mark.parametrize("host", ["localhost:99999", "registry.example:0", "[::1]:65536"])
def test_a_port_that_there_is_not_is_told(client: Client, host: str) -> None:
    with pytest.raises(RegistryError, match="expected a port from 1 to 65535, found"):
        client.registries().digest(Reference.parse(f"{host}/web:1"))


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"default": "https://registry.example"}, "expected HOST"),
        ({"default": "registry.example/path"}, "expected HOST"),
        (
            {"hosts": {"a.example": {"address": "http://a.example"}}},
            "plain http is for loopback addresses only",
        ),
        ({"hosts": {"a.example": {"address": "https://u:p@a.example"}}}, "user name or password"),
        ({"hosts": {"a.example": {"address": "a.example"}}}, "expected an address such as"),
        ({"hosts": {"a.example": {"address": "https://a.example/v2"}}}, "something after the host"),
        ({"hosts": {"a.example": {"mirrors": ["b.example/"]}}}, "expected HOST"),
        ({"hosts": {"a.example": {"mirrors": ["b.example:65536/x"]}}}, "from 1 to 65535, found 65536"),
        ({"hosts": {"a.example": {"address": "https://a:123456"}}}, "from 1 to 65535, found 123456"),
        ({"default": "[::1]:0"}, "from 1 to 65535, found 0"),
        ({"hosts": {"a.example": {"username": "me"}}}, "username and password together"),
        ({"hosts": {"a.example": {"username": "a:b", "password": {"env": "P"}}}}, "without a colon"),
        (
            {"hosts": {"a.example": {"username": "a", "password": {"env": "P"}, "token": {"env": "T"}}}},
            "found both",
        ),
        ({"hosts": {"a.example": {"password": "literal"}}}, "reference to a secret"),
        ({"hosts": {"a.example": {"cert_file": "x"}}}, "cert_file and key_file together"),
    ],
)
def test_settings_that_are_wrong_are_refused(section: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        validate(RegistriesSettings, Document({"registries": section}), at="registries")
