"""Observers: told about everything, trusted with nothing, unable to do harm."""

from __future__ import annotations

from datetime import timedelta

import pytest

from firebuild_pki import (
    CAEvent,
    EventKind,
    MaterialError,
    PluginCatalog,
    Profile,
    ProviderLoadError,
    SettingsError,
    ca_json_schema,
    open_authority,
    redacted,
)
from firebuild_pki.config import NOT_SELECTED
from pki import characters
from pki.conftest import Install
from pki.tools import NOW, Clock, ca_settings, catalog_of, entry, leaf_of


def test_observers_hear_of_everything_and_never_of_keys() -> None:
    characters.witness.events.clear()
    catalog = catalog_of("revoker", observers=["witness"])
    settings = ca_settings({"provider": "revoker", "observers": ["witness"]}, catalog)
    with open_authority(settings, build_id="b", clock=Clock()) as authority:
        material = authority.issue_server()
        authority.revoke(material)
        authority.revoke(authority.issue_guest())
        deadline = NOW.replace(year=2031)
        with pytest.raises(MaterialError):
            authority.issue_guest(build_deadline=deadline)
    events = characters.witness.events
    server, guest, one, other = Profile.SERVER, Profile.GUEST, EventKind.ISSUED, EventKind.REVOKED
    expected: list[tuple[EventKind, Profile | None]] = [
        (one, server),
        (other, server),
        (one, guest),
        (other, guest),
    ]
    expected += [(EventKind.REFUSED, guest), (EventKind.CLOSED, None)]
    assert [(event.kind, event.profile) for event in events] == expected
    leaf = leaf_of(material)
    assert events[0] == CAEvent(
        EventKind.ISSUED,
        NOW,
        "revoker",
        "b",
        Profile.SERVER,
        ("b.firebuild.internal",),
        f"{leaf.serial_number:x}",
        material.fingerprint_sha256,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
        signature_algorithm="ECDSA with SHA-256",
    )
    assert "may need it until" in str(events[4].reason)
    assert "PRIVATE" not in repr(events)


def test_an_observer_that_fails_is_a_warning_and_keeps_nobody_from_hearing() -> None:
    characters.witness.events.clear()
    catalog = catalog_of(observers=["witness", "drunkard"])
    settings = ca_settings({"observers": ["drunkard", "witness"]}, catalog)
    with open_authority(settings, clock=Clock()) as authority:
        assert authority.issue_server()
        assert authority.warnings == ('the observer "drunkard" failed on "issued": OSError: disk full',)
    assert [event.kind for event in characters.witness.events] == [EventKind.ISSUED, EventKind.CLOSED]


def test_observers_are_listed_without_being_imported(install: Install) -> None:
    group = "firebuild_pki.observers"
    install("acme-log", "raise SystemExit", name="acme-log", module="acme_log", group=group)
    assert "acme-log 1.2" in [str(plugin) for plugin in PluginCatalog().observers()]


def test_an_observer_without_its_hook_is_refused() -> None:
    catalog = PluginCatalog(observers=[entry("good", "pki.signers:good")])
    with pytest.raises(ProviderLoadError, match="does not implement the hook ca_event"):
        catalog.load_observer("good")


def test_an_observer_gets_its_own_settings() -> None:
    characters.scribe.lines.clear()
    catalog = catalog_of(observers=["scribe"])
    section = {"observers": ["scribe"], "scribe": {"pages": 3}}
    with open_authority(ca_settings(section, catalog), clock=Clock()) as authority:
        authority.issue_server()
    assert characters.scribe.lines == ["issued in blue on 3", "closed in blue on 3"]
    shown = redacted(ca_settings(section, catalog))
    assert shown["scribe"] == {"ink": "blue", "pages": 3}
    assert redacted(ca_settings({"scribe": {"pages": 3}}, catalog))["scribe"] == NOT_SELECTED
    schema = ca_json_schema(catalog)["properties"]
    assert set(schema["scribe"]["properties"]) == {"ink", "pages"}


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("scribe", {"pages": "3"}, "ca.scribe.pages: expected a whole number, found a string"),
        ("scribe", {"pages": 3, "inc": "red"}, r'ca.scribe.inc: unknown setting \(hint: did you mean "ink"'),
        ("scribe", None, "ca.scribe.pages: this setting is required"),
        ("witness", {"pages": 3}, 'ca.witness: the observer "witness" has no settings'),
    ],
)
def test_wrong_settings_of_an_observer_are_named(name: str, block: object, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ca_settings({"observers": [name], name: block}, catalog_of(observers=[name]))


def test_blocks_of_observers_that_are_not_selected_are_not_read() -> None:
    ca_settings({"scribe": {"nonsense": 1}}, catalog_of(observers=["scribe"]))


def test_an_observer_is_named_once() -> None:
    with pytest.raises(SettingsError, match=r'ca.observers\[1\]: the observer "scribe" is named twice'):
        ca_settings(
            {"observers": ["scribe", "scribe"], "scribe": {"pages": 3}}, catalog_of(observers=["scribe"])
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad-model", "ca_observer_settings must return a pydantic model, found dict"),
        ("failing-model", "its hook failed: LookupError: not today"),
    ],
)
def test_an_observer_with_a_broken_model_is_refused(name: str, message: str) -> None:
    catalog = catalog_of(observers=[name])
    with pytest.raises(ProviderLoadError, match=message):
        ca_settings({"observers": [name]}, catalog)
    assert name not in ca_json_schema(catalog)["properties"] or ca_json_schema(catalog)["properties"][
        name
    ] == {"type": "object"}


def test_an_observer_that_does_not_return_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firebuild_pki.authority.OBSERVER_LIMIT", timedelta(seconds=0.2))
    characters.MORNING.clear()
    try:
        settings = ca_settings({"observers": ["snorer"]}, catalog_of(observers=["snorer"]))
        with open_authority(settings, clock=Clock()) as authority:
            authority.issue_server()
            authority.issue_guest()
        failed = 'the observer "snorer" failed on'
        assert authority.warnings == (
            f'{failed} "issued": noting it did not end within 0.2 s',
            f'{failed} "issued": noting it is not possible: noting it has not ended yet',
            f'{failed} "closed": noting it is not possible: noting it has not ended yet',
            f'{failed} "the end": noting it did not end within 0.2 s',
        )
    finally:
        characters.MORNING.set()
