"""Observers: told about everything, trusted with nothing, unable to do harm."""

from __future__ import annotations

import pytest

from firebuild_pki import (
    CAEvent,
    EventKind,
    MaterialError,
    PluginCatalog,
    Profile,
    ProviderLoadError,
    open_authority,
)
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
