"""The settings: two ways, each complete, never mixed; secrets by reference only."""

from __future__ import annotations

from typing import Any

import pytest

from firebuild_pki import Capability, ProviderContext, SettingsError, redacted
from firebuild_pki.provider import utc_now
from firebuild_pki.providers.file import register_ca_providers
from firebuild_pki.providers.file.settings import FileSettings
from pki_file.operator_files import opened, settings_of

SIGN = {"ca_cert": "ca.pem", "ca_key": "ca.key"}
SIGNS = {Capability.SIGN, Capability.URI_NAMES, Capability.PEER}
PAIRS = {
    "ca_cert": "ca.pem",
    "server_cert": "s.pem",
    "server_key": "s.key",
    "client_cert": "c.pem",
    "client_key": "c.key",
}


def notes(**block: Any) -> list[tuple[str, str, bool]]:
    provider = register_ca_providers().factory(FileSettings(**block), ProviderContext(utc_now, {}))
    return [(note.path, note.message, note.fatal) for note in provider.validate()]


def capabilities(**block: Any) -> set[Capability]:
    spec = register_ca_providers()
    return set(spec.factory(FileSettings(**block), ProviderContext(utc_now, {})).capabilities() or ())


def test_both_ways_are_complete_as_they_are() -> None:
    assert notes(**SIGN) == []
    assert notes(**SIGN, chain="chain.pem", anchors=("root.pem",)) == []
    assert notes(**PAIRS) == []
    assert notes(**PAIRS, server_name="a.example.com", anchors=("root.pem",)) == []


def test_the_settings_decide_what_the_provider_can_do() -> None:
    assert capabilities(**SIGN) == SIGNS
    assert capabilities() == SIGNS
    assert capabilities(**PAIRS) == {Capability.READY_PAIRS}
    assert capabilities(server_key="s.key") == {Capability.READY_PAIRS}
    assert set(register_ca_providers().capabilities) == {*SIGNS, Capability.READY_PAIRS}


def test_nothing_at_all_is_too_little() -> None:
    assert notes() == [("ca_cert", "missing", True), ("ca_key", "missing", True)]


@pytest.mark.parametrize("missing", SIGN)
def test_half_a_ca_names_the_other_half(missing: str) -> None:
    (there,) = SIGN.keys() - {missing}
    assert notes(**{there: "x"}) == [(missing, f"missing beside {there}", True)]


@pytest.mark.parametrize("missing", PAIRS)
def test_pairs_without_one_part_name_it(missing: str) -> None:
    rest = {name: path for name, path in PAIRS.items() if name != missing}
    assert notes(**rest) == [(missing, f"missing beside {', '.join(rest)}", True)]


def test_a_lone_setting_of_the_pairs_asks_for_all_the_others() -> None:
    found = notes(server_name="a.example.com")
    assert [path for path, _, _ in found] == list(PAIRS)
    assert {message for _, message, _ in found} == {"missing beside server_name"}


@pytest.mark.parametrize("extra", ["ca_key", "ca_key_passphrase"])
def test_mixing_both_ways_names_all_that_clashes(extra: str) -> None:
    value: object = {"env": "X"} if extra == "ca_key_passphrase" else "x"
    ((path, message, fatal),) = notes(**PAIRS, **{extra: value})
    assert (path, fatal) == (extra, True)
    assert message == (
        "expected a CA that signs or finished certificates, found both: "
        f"{extra}, server_cert, server_key, client_cert, client_key"
    )


def test_what_has_no_effect_on_finished_certificates_is_a_remark() -> None:
    text = "has no effect on finished certificates"
    assert notes(**PAIRS, leaf_lifetime="2h", backdate="0s") == [
        ("leaf_lifetime", text, False),
        ("backdate", text, False),
    ]


def test_mistakes_come_before_any_file_is_read() -> None:
    with pytest.raises(SettingsError) as caught:
        opened(ca_cert="/nowhere/ca.pem", server_name="a.example.com")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "ca.file.server_cert: missing beside ca_cert, server_name (hint: " in lines[0]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ca_certificate": "x"}, "ca.file.ca_certificate"),
    ({"ca_cert": ""}, "ca.file.ca_cert"),
    ({"ca_cert": 5}, "ca.file.ca_cert"),
    ({"anchors": "root.pem"}, "ca.file.anchors"),
    ({"anchors": [""]}, "ca.file.anchors"),
    ({"ca_key_passphrase": "hunter2"}, "ca.file.ca_key_passphrase"),
    ({"leaf_lifetime": 5}, "ca.file.leaf_lifetime"),
    ({"leaf_lifetime": "0s"}, "ca.file.leaf_lifetime"),
    ({"server_name": ""}, "ca.file.server_name"),
]


@pytest.mark.parametrize(("block", "path"), BAD)
def test_wrong_values_are_refused_where_they_are(block: dict[str, Any], path: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings_of(block)
    assert path in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_dump_of_the_settings_loads_again_without_new_remarks() -> None:
    settings = settings_of(PAIRS)
    dumped = redacted(settings)["file"]
    assert settings_of(dumped).provider_settings == settings.provider_settings
    assert notes(**FileSettings(**dumped).model_dump()) == []


def test_every_setting_is_described() -> None:
    properties = FileSettings.json_schema()["properties"]
    assert properties.keys() == FileSettings.model_fields.keys()
    assert all(one.get("description", "").endswith(".") for one in properties.values())
