"""What a role refuses becomes a hint that names the setting to change; the refusals are the server's own."""

from __future__ import annotations

from typing import Any

import pytest

from baoserver import add_role
from firebuild_pki import MaterialError, ProviderError
from pki_vault.tools import Backend, raises

pytestmark = pytest.mark.needs("bao")

ROLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "other domain": (
        {"allowed_domains": ["example.com"]},
        "b1.firebuild.internal not allowed by this role",
        "allowed_domains",
    ),
    "no domain": ({"allowed_domains": []}, "not allowed by this role", "allowed_domains"),
    "no subdomains": ({"allow_subdomains": False}, "not allowed by this role", "allow_subdomains=true"),
    "bare domain": (
        {"allowed_domains": ["b1.firebuild.internal"], "allow_subdomains": False},
        "not allowed by this role",
        "allow_bare_domains",
    ),
    "glob": (
        {"allowed_domains": ["*.firebuild.internal"], "allow_subdomains": False},
        "not allowed by this role",
        "allow_glob_domains",
    ),
    "name as e-mail": ({"cn_validations": ["email"]}, "not allowed by this role", "cn_validations"),
    "rsa only": (
        {"key_type": "rsa"},
        "role requires keys of type rsa",
        "set ca.key_type to a kind of rsa key",
    ),
    "ed25519 only": ({"key_type": "ed25519"}, "role requires keys of type ed25519", "key_type=any"),
    "larger keys": (
        {"key_type": "ec", "key_bits": 384},
        "role requires a minimum of a 384-bit key",
        "set ca.key_type to a key of 384 bits, or lower key_bits of the role ROLE",
    ),
    "fixed end": (
        {"not_after": "2037-01-01T00:00:00Z"},
        "Either ttl or not_after",
        "clear not_after of the role ROLE",
    ),
    "unknown issuer": ({"issuer_ref": "nobody"}, "unable to find PKI issuer", "issuer_ref of the role ROLE"),
}


@pytest.mark.parametrize("case", ROLES)
def test_a_role_that_does_not_fit_is_named_with_the_setting_to_change(
    case: str, backend: Backend, unique: str
) -> None:
    parameters, words, hint = ROLES[case]
    add_role(backend.api, unique, use="server", **parameters)
    root = backend.with_token(backend.api.token)
    with (
        raises(ProviderError, "ca-provider(vault): ", words, hint.replace("ROLE", unique)),
        root.open(server_role=unique, issuer="default" if "issuer" not in case else None) as authority,
    ):
        authority.issue_server()


USAGES: dict[str, tuple[dict[str, Any], str]] = {
    "one too many": (
        {"client_flag": True, "code_signing_flag": True},
        "gave: clientAuth, codeSigning, serverAuth",
    ),
    "none": ({"server_flag": False}, "gave: none"),
    "the other": ({"server_flag": False, "client_flag": True}, "gave: clientAuth"),
    "one more": ({"ext_key_usage": ["TimeStamping"]}, "gave: serverAuth, timeStamping"),
    "unknown": ({"ext_key_usage_oids": ["1.2.3.4"]}, "gave: 1.2.3.4, serverAuth"),
}


@pytest.mark.parametrize("case", USAGES)
def test_a_wrong_extended_key_usage_is_blamed_on_the_flags_of_the_role(
    case: str, backend: Backend, unique: str
) -> None:
    parameters, words = USAGES[case]
    add_role(backend.api, unique, use="server", **parameters)
    hint = f"set server_flag=true and no ext_key_usage on the role {unique}"
    with (
        raises(MaterialError, f"but the role {unique} {words}", hint),
        backend.with_token(backend.api.token).open(server_role=unique) as authority,
    ):
        authority.issue_server()


def test_a_name_too_long_for_a_common_name_needs_require_cn_off(backend: Backend, unique: str) -> None:
    suffix = "builds.of-a-large-organisation.with-a-long-name.firebuild.internal"
    add_role(backend.api, unique, use="server", require_cn=True)
    root = backend.with_token(backend.api.token)
    with (
        raises(
            ProviderError, "the common_name field is required", f"set require_cn=false on the role {unique}"
        ),
        root.open(server_role=unique, ca={"name_suffix": suffix}) as authority,
    ):
        authority.issue_server()
    with root.open(ca={"name_suffix": suffix}) as authority:
        assert authority.issue_server().identity == f"b1.{suffix}"


@pytest.mark.parametrize("off", ["use_csr_sans", "use_csr_common_name"])
def test_roles_that_ignore_the_names_in_the_request_get_them_beside_it(
    off: str, backend: Backend, unique: str
) -> None:
    parameters: dict[str, Any] = {off: False}
    add_role(backend.api, unique, use="server", **parameters)
    with backend.with_token(backend.api.token).open(server_role=unique) as authority:
        assert authority.issue_server().identity == "b1.firebuild.internal"
        assert authority.warnings == ()


PLACES: dict[str, tuple[dict[str, Any], str, str]] = {
    "role": ({"server_role": "nobody"}, "unknown role: nobody", "bao list pki/roles"),
    "issuer": ({"issuer": "nobody"}, "unable to find PKI issuer", "bao list pki/issuers"),
    "mount": ({"mount": "elsewhere"}, "", "bao secrets list"),
    "kind of mount": ({"mount": "secret"}, "", "secret is a secrets engine of type kv"),
    "part of a mount": ({"mount": "pki/below"}, "", "bao secrets list"),
    "mount of a namespace": ({"mount": "there"}, "", "or namespace to the one that it is in"),
    "namespace": ({"namespace": "nowhere"}, "", "bao namespace list"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_wrong_place_is_named(case: str, backend: Backend) -> None:
    changes, words, hint = PLACES[case]
    root = backend.with_token(backend.api.token)
    with raises(ProviderError, words, hint), root.open(**changes) as authority:
        authority.issue_server()


def test_a_path_where_vault_is_not_is_doubted(backend: Backend) -> None:
    with raises(ProviderError, "status 404", "look at the setting address, and at a path in it"):
        backend.open(address=f"{backend.api.address}/vault")


def test_a_capped_lifetime_is_a_warning_that_names_the_setting(backend: Backend, unique: str) -> None:
    add_role(backend.api, unique, use="server", max_ttl="10m")
    with backend.with_token(backend.api.token).open(server_role=unique) as authority:
        authority.issue_server()
        assert any(f"raise max_ttl of the role {unique}" in text for text in authority.warnings)
        assert any("the CA capped the lifetime of the server" in text for text in authority.warnings)
