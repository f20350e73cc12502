"""What `check` finds out, without a certificate being made."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from firebuild_pki import Note, NoteLevel, ProviderError

from cfssl_servers import LABEL, Pki, log_of, now, opened, serving
from stub_server import Stub, refusal, success

pytestmark = pytest.mark.needs("cfssl")


def notes(address: str, **block: Any) -> dict[str, Note]:
    """Look at a server; the notes by what they are about, none of them twice."""
    with opened(address, **block) as authority:
        found = authority.check()
    assert len({note.about for note in found}) == len(found)
    return {note.about: note for note in found}


def fatal(address: str, **block: Any) -> str:
    with opened(address, **block) as authority, pytest.raises(ProviderError) as caught:
        authority.check()
    return str(caught.value)


@pytest.mark.parametrize("label", ["", LABEL])
def test_a_healthy_server(server: str, multiroot_server: str, label: str) -> None:
    found = notes(multiroot_server if label else server, label=label)
    abouts = ["reachable", "ca", "clock", "server profile", "server key", "guest profile", "guest key"]
    assert list(found) == abouts
    assert {note.level for note in found.values()} == {NoteLevel.OK}
    assert found["ca"].message.startswith('"CN=Example ca", valid until ')
    assert str(found["server profile"]) == 'server_profile: profile "firebuild-server" signs for 65m'


def test_looking_makes_no_certificate(pki: Pki) -> None:
    made = "signed certificate with serial number"
    with serving(pki) as address:
        notes(address)
        assert made not in log_of(pki, address).read_text()
        with opened(address) as authority:
            authority.issue_server()
        assert made in log_of(pki, address).read_text()


def test_a_wrong_key_is_noticed(server: str, multiroot_server: str) -> None:
    assert "does not accept the authentication key" in fatal(server, key="00")
    assert "does not accept the authentication key" in fatal(multiroot_server, key="00", label=LABEL)


def test_a_profile_with_the_wrong_usages(server: str) -> None:
    said = fatal(server, server_profile="firebuild-guest", guest_profile="firebuild-server")
    assert (
        'server_profile: expected the usages "digital signature" and "server auth" and not '
        '"client auth" in profile "firebuild-guest", found client auth, digital signature'
    ) in said
    assert "guest_profile: expected" in said


def test_a_profile_with_too_few_usages(server: str) -> None:
    assert 'in profile "typo", found ' in fatal(server, server_profile="typo")


def test_a_profile_for_both_ends_is_a_warning(server: str) -> None:
    with opened(server, server_profile="both") as authority:
        (note,) = [note for note in authority.check() if note.about == "server profile"]
    assert note.level is NoteLevel.WARNING
    assert 'and not "client auth" in profile "both", found client auth, ' in note.message


def test_a_profile_without_authentication(server: str) -> None:
    assert 'profile "open" signs without authentication' in fatal(server, server_profile="open")


def test_a_server_that_went_away(pki: Pki) -> None:
    with serving(pki) as address:
        authority = opened(address)
    with authority, pytest.raises(ProviderError, match=f"http://{address}: connection refused"):
        authority.check()


def test_a_clock_that_is_off(server: str) -> None:
    with opened(server, clock=lambda: now() - timedelta(minutes=4)) as authority:
        (note,) = [note for note in authority.check() if note.about == "clock"]
    assert note.level is NoteLevel.WARNING
    assert note.message.endswith(" s ahead of ours")


def test_a_server_without_a_clock(stub: Stub, pki: Pki) -> None:
    stub.dated = False
    usages = {"usages": ["signing", "server auth"], "expiry": ""}
    info = success(certificate=pki.ca.read_text(), **usages)
    guest = success(certificate=pki.ca.read_text(), usages=["signing", "client auth"])
    readable = refusal("CSR Decode failed")
    stub.answers = [info, info, info, readable, guest, (500, b"")]
    with opened(stub.address) as authority, pytest.raises(ProviderError) as caught:
        authority.check()
    assert "expected an answer of cfssl" in caught.value.message
    assert stub.paths.count("/api/v1/cfssl/authsign") == 2
