"""The section `ca`, field types, and what mistakes look like: exact words, exact positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from pydantic import AnyUrl, Field, ValidationError, field_validator

from firebuild_pki import (
    CASettings,
    KeyType,
    PluginCatalog,
    SecretRef,
    Settings,
    SettingsError,
    ca_json_schema,
    open_authority,
    parse_document,
    redacted,
    validate,
)
from firebuild_pki.config import NOT_SELECTED
from firebuild_pki.providers.embedded import EmbeddedSettings
from pki.models import Everything, Server, problems
from pki.tools import ca_settings, catalog_of, entry

QUOTE = "(hint: quote it; in an environment variable as well: '\"…\"')"
LIST = "(hint: write [a, b]; brackets are also for a single one)"


def test_an_empty_document_means_defaults() -> None:
    settings = validate(Everything, parse_document(""))
    assert settings.server.port == 443
    assert settings.ca.provider == "embedded"
    assert settings.ca.provider_settings == EmbeddedSettings()


def test_keys_without_a_value_count_as_not_written() -> None:
    settings = validate(Everything, parse_document("server:\nca:\n  embedded:\n  provider:\n"))
    assert settings == validate(Everything, parse_document(""))
    assert problems("server: {address: }") == ["fb.yaml:1:10: server.address: this setting is required"]
    assert problems("server: {address: a, prt: }") == [
        'fb.yaml:1:22: server.prt: unknown setting (hint: did you mean "port"?)'
    ]


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file() -> None:
    text = """\
server:
  adress: vault.example
  port: "8200"
  verify: yes
  timeout: 30
ca:
  provider: embeded
  embedded:
    key_typ: p256
  name_suffix: 7
  bundled: {}
other: 1
"""
    assert problems(text, catalog=catalog_of()) == [
        "fb.yaml:1:1: server.address: this setting is required",
        'fb.yaml:2:3: server.adress: unknown setting (hint: did you mean "address"?)',
        "fb.yaml:3:9: server.port: expected a whole number, found a string",
        "fb.yaml:4:11: server.verify: expected true or false, found a string",
        "fb.yaml:5:12: server.timeout: expected a duration such as 90s or 1h30m, found the bare number 30 "
        '(hint: add a unit, for example "30s")',
        'fb.yaml:7:13: ca.provider: no installed provider is called "embeded" '
        '(hint: did you mean "embedded"?)',
        f"fb.yaml:10:16: ca.name_suffix: expected a string, found a number {QUOTE}",
        "fb.yaml:11:3: ca.bundled: neither a setting nor an installed plugin (hint: known are: "
        "call_timeout, embedded, issue_timeout, key_type, name_suffix, observers, provider, revoke_at_end)",
        "fb.yaml:12:1: other: unknown setting (hint: known are: ca, server)",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server: 5", "1:9: server: expected a mapping, found a number"),
        ("server: []", "1:9: server: expected a mapping, found a list"),
        ("server: {address: 5}", f"1:19: server.address: expected a string, found a number {QUOTE}"),
        ("server: {address: true}", f"1:19: server.address: expected a string, found a boolean {QUOTE}"),
        ("server: {address: a, port: 1.0}", "1:28: server.port: expected a whole number, found a number"),
        ("server: {address: a, verify: 1}", "1:30: server.verify: expected true or false, found a number"),
        (
            "server: {address: a, ratio: '1'}",
            "1:29: server.ratio: expected a number, found a string",
        ),
        (
            "server: {address: a, timeout: 10 s}",
            "1:31: server.timeout: expected a duration such as 90s or 1h30m, "
            'found "10 s" (hint: units are ms, s, m and h, joined without spaces)',
        ),
        (
            "server: {address: a, timeout: -1s}",
            '1:31: server.timeout: expected a duration of zero or more, found "-1s"',
        ),
        (
            "server: {address: a, timeout: true}",
            "1:31: server.timeout: expected a duration such as 90s or 1h30m, found a boolean",
        ),
        (
            "server: {address: a, auth: {method: tokn}}",
            "1:37: server.auth.method: expected 'token', 'approle', found 'tokn' "
            '(hint: did you mean "token"?)',
        ),
        (
            "server: {address: a, auth: {metod: token}}",
            "1:22: server.auth.method: this setting is required",
        ),
        (
            "server: {address: a, auth_method: token}",
            '1:22: server.auth_method: unknown setting (hint: did you mean "auth.method"? '
            "an environment variable has it as …AUTH__METHOD)",
        ),
        (
            "server: {address: a, auth: {method: approle, role_ed: {env: A}}}",
            '1:46: server.auth.role_ed: unknown setting (hint: did you mean "role_id"?)',
        ),
        (
            "server: {address: a, auth: {method: approle, role_id: {env: A}, mounts: [a, 2]}}",
            f"1:77: server.auth.mounts[1]: expected a string, found a number {QUOTE}",
        ),
        (
            "server: {address: a, auth: {method: token, token: {env: A}, mounts: [a]}}",
            "1:61: server.auth.mounts: unknown setting (hint: known are: method, token)",
        ),
        (
            "server: {address: a, auth: {method: token, token: {env: A}, env: A}}",
            "1:61: server.auth.env: unknown setting (hint: known are: method, token)",
        ),
        (
            "ca: {provider: file, file: {ca_cert: ''}}",
            "1:38: ca.file.ca_cert: expected at least 1 character, found none",
        ),
        (
            "server: {address: a, replicas: [{address: b}, {address: c, pot: 1}]}",
            '1:60: server.replicas[1].pot: unknown setting (hint: did you mean "port"?)',
        ),
        (
            "server: {address: a, limits: {cpu: x}}",
            "1:36: server.limits.cpu: expected a whole number, found a string",
        ),
        (
            "server: {address: a, limits: {cpu: null}}",
            "1:36: server.limits.cpu: expected a whole number, found nothing",
        ),
        (
            "server: {address: a, limits: {cpu: 0}}",
            "1:36: server.limits.cpu: expected a value greater than or equal to 1, found 0",
        ),
        (
            "ca: {key_type: p265}",
            "1:16: ca.key_type: expected 'p256', 'p384', 'rsa2048', 'rsa3072' or 'rsa4096', "
            "found 'p265' (hint: did you mean \"p256\"?)",
        ),
        (
            "ca: {key_type: 256}",
            "1:16: ca.key_type: expected 'p256', 'p384', 'rsa2048', 'rsa3072' or 'rsa4096', found a number",
        ),
        ("ca: {provider: 5}", f"1:16: ca.provider: expected a string, found a number {QUOTE}"),
        ("ca: 5", "1:5: ca: expected a mapping, found a number"),
        ("ca: {embedded: 5}", "1:16: ca.embedded: expected a mapping, found a number"),
        (
            "ca: {embedded: {ca_lifetime: 0s}}",
            "1:30: ca.embedded.ca_lifetime: expected a duration above zero",
        ),
        (
            "ca: {observers: [audit]}",
            '1:18: ca.observers[0]: no installed observer is called "audit" '
            '(hint: did you mean "audit-log"?)',
        ),
        ("ca: {observers: [5]}", f"1:18: ca.observers[0]: expected a string, found a number {QUOTE}"),
        ("ca: {observers: audit}", f"1:17: ca.observers: expected a list, found a string {LIST}"),
    ],
)
def test_each_mistake_has_its_words_and_its_place(text: str, problem: str) -> None:
    found = problems(text)
    assert f"fb.yaml:{problem}" in found


def test_models_of_plugins_may_have_any_type_of_pydantic() -> None:
    class Odd(Settings):
        pair: tuple[int, str] = (1, "a")
        ranges: tuple[tuple[int, int], ...] = ()
        url: AnyUrl | None = None
        mute: int = 1

        @field_validator("mute")
        @classmethod
        def _refuse(cls, _: int) -> int:
            raise ValueError

    text = "pair: [1]\nranges: [[1, 2], [3]]\nurl: nowhere\nmute: 2\n"
    assert problems(text, Odd) == [
        "fb.yaml:1:1: pair[1]: this setting is required",
        "fb.yaml:2:18: ranges[1][1]: this setting is required",
        "fb.yaml:3:6: url: expected a valid URL, relative URL without a base, found a string",
        "fb.yaml:4:7: mute: this value is not accepted",
    ]


def test_a_section_can_be_validated_alone_with_its_full_path() -> None:
    assert problems("a: {b: {address: x, prt: 1}}", Server, "a.b") == [
        'fb.yaml:1:21: a.b.prt: unknown setting (hint: did you mean "port"?)'
    ]
    assert validate(Server, parse_document("a: {b: {address: x}}"), "a.b").address == "x"
    assert problems("a: 5", Server, "a.b") == ["fb.yaml:1:1: a.b.address: this setting is required"]


def test_settings_from_the_environment_are_blamed_by_variable() -> None:
    document = parse_document("ca: {embedded: {}}", source="fb.yaml").merged(
        {"FIREBUILD_CA__EMBEDDED__BACKDATE": "5", "FIREBUILD_CA__PROVDER": "x"}
    )
    with pytest.raises(SettingsError) as caught:
        validate(Everything, document)
    assert str(caught.value).splitlines() == [
        "environment variable FIREBUILD_CA__EMBEDDED__BACKDATE: ca.embedded.backdate: expected a duration "
        'such as 90s or 1h30m, found the bare number 5 (hint: add a unit, for example "5s")',
        "environment variable FIREBUILD_CA__PROVDER: ca.provder: neither a setting nor an installed "
        'plugin (hint: did you mean "provider"?)',
    ]


def test_a_missing_setting_of_a_section_from_the_environment_is_named_with_its_variable() -> None:
    document = parse_document("ca: {}", source="fb.yaml").merged({"FIREBUILD_SERVER__PORT": "5"})
    with pytest.raises(SettingsError) as caught:
        validate(Everything, document)
    (problem,) = caught.value.problems
    assert problem.message == "this setting is required"
    assert problem.hint == "set FIREBUILD_SERVER__ADDRESS, or write it in the file of --config"


def test_a_bare_source_tree_without_entry_points_is_explained() -> None:
    (problem,) = problems("", CASettings, "ca", catalog=PluginCatalog(providers=[]))
    assert problem == (
        'fb.yaml: ca.provider: no installed provider is called "embedded" (hint: nothing is installed '
        "under that entry-point group; a source tree must be installed to count)"
    )


def test_only_the_selected_provider_has_its_settings_read() -> None:
    section = {"provider": "revoker", "revoker": {"mode": "odd"}, "embedded": {"key_typ": "x"}}
    settings = ca_settings(section, catalog_of("revoker"))
    assert settings.provider_settings.model_dump() == {"mode": "odd"}


def test_dashes_of_a_providers_name_may_be_underscores() -> None:
    catalog = catalog_of("good", "wrong-key")
    settings = ca_settings({"provider": "wrong-key", "wrong_key": {}}, catalog)
    assert settings.provider_settings.model_dump() == {}
    text = "ca: {provider: wrong-key, wrong_key: {x: 1}}"
    assert problems(text, CASettings, "ca", catalog=catalog) == [
        "fb.yaml:1:39: ca.wrong_key.x: unknown setting"
    ]


def test_settings_made_in_python_may_hold_models_and_python_values() -> None:
    embedded = EmbeddedSettings(backdate=timedelta(0))
    by_model = CASettings.model_validate({"embedded": embedded, "key_type": KeyType.P384})
    by_values = CASettings.model_validate(
        {"embedded": {"backdate": timedelta(0)}, "key_type": "p384", "observers": ()}
    )
    assert by_model.provider_settings == by_values.provider_settings == embedded
    assert CASettings.model_validate(by_model) == by_model
    with pytest.raises(ValidationError, match="no installed provider"):
        CASettings(provider="nope")


def test_the_dump_for_display_keeps_references_and_leaves_out_foreign_blocks() -> None:
    text = """
server: {address: a, auth: {method: token, token: {env: TOKEN}}, timeout: 90s}
ca: {provider: embedded, embedded: {backdate: 1m}, revoker: {token: s.SECRET}}
"""
    catalog = catalog_of("revoker")
    settings = validate(Everything, parse_document(text), context={"catalog": catalog})
    shown = redacted(settings)
    assert shown["server"]["auth"] == {"method": "token", "token": {"env": "TOKEN"}}
    assert shown["ca"]["embedded"]["backdate"] == "1m"
    assert shown["ca"]["revoker"] == NOT_SELECTED
    assert "SECRET" not in repr(shown)
    del shown["ca"]["revoker"]
    again = validate(Everything, parse_document(yaml.safe_dump(shown)), context={"catalog": catalog})
    assert redacted(again) == shown


def _accepts(schema: Mapping[str, Any], text: str) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(yaml.safe_load(text)))


def test_the_json_schema_knows_the_settings_of_the_providers() -> None:
    catalog = PluginCatalog(
        providers=[
            entry("embedded", "firebuild_pki.providers.embedded"),
            entry("revoker", "pki.characters:revoker"),
            entry("broken", "no_such_module"),
        ]
    )
    schema = ca_json_schema(catalog)
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema)
    assert _accepts(schema, "{provider: embedded, embedded: {key_type: p384, backdate: 1h30m}}")
    assert _accepts(schema, "{revoker: {mode: odd}, broken: {any: thing}}")
    assert not _accepts(schema, "{embedded: {key_type: p385}}")
    assert not _accepts(schema, "{embedded: {backdate: 5}}")
    assert not _accepts(schema, "{revoker: {mood: odd}}")
    assert not _accepts(schema, "{nobody: {}}")
    assert "Sign leaves with an intermediate CA" in json.dumps(schema)


def test_the_json_schema_also_works_as_a_part_of_another() -> None:
    schema = Everything.model_json_schema()
    assert _accepts(schema, "{ca: {embedded: {backdate: 5m}}, server: {address: a}}")
    assert not _accepts(schema, "{ca: {embedded: {backdat: 5m}}}")
    token = "{address: a, auth: {method: token, token: %s}}"
    assert _accepts(schema, "server: " + token % "{env: A}")
    assert not _accepts(schema, "server: " + token % "{env: A, file: B}")


class Parent(Settings):
    described: int = 1
    """What it means,
    in two lines."""
    silent: int = 2
    mentioned: Annotated[int, Field(description="its own words")] = 3
    """Words of the class."""


class Child(Parent):
    described: int = 4
    added: SecretRef | None = None
    """Where the secret is."""


def test_the_string_below_a_setting_describes_it_in_the_schema() -> None:
    properties = Child.json_schema()["properties"]
    assert {name: body.get("description") for name, body in properties.items()} == {
        "described": "What it means,\nin two lines.",
        "silent": None,
        "mentioned": "its own words",
        "added": "Where the secret is.",
    }


def test_settings_without_their_source_have_a_schema_without_descriptions() -> None:
    namespace: dict[str, Any] = {"Settings": Settings, "__name__": "shipped.without.source"}
    exec("class Compiled(Settings):\n    number: int = 1\n    'Text.'", namespace)
    assert namespace["Compiled"].json_schema()["properties"] == {
        "number": {"default": 1, "title": "Number", "type": "integer"}
    }


def test_a_plain_mapping_is_enough_to_open_an_authority() -> None:
    with open_authority({"embedded": {"intermediate": False}}, build_id="b") as authority:
        assert authority.issue_server()


def test_keys_without_a_value_count_as_not_written_in_the_block_of_a_provider_too() -> None:
    settings = ca_settings({"embedded": {"backdate": None, "intermediate": None}})
    assert settings.provider_settings == EmbeddedSettings()


def test_what_is_shown_of_the_settings_loads_again() -> None:
    section = {
        "provider": "vault",
        "vault": {
            "address": "https://vault.example",
            "server_role": "s",
            "guest_role": "g",
            "auth": {"method": "approle", "role_id": {"env": "A"}, "secret_id": {"file": "/b"}},
        },
    }
    settings = ca_settings(section)
    assert ca_settings(redacted(settings)) == settings
