"""What a check tells: everything looked at, and what to renew before it is too late."""

from __future__ import annotations

from typing import Any

import pytest

from firebuild_pki import Note, NoteLevel
from pki_file.operator_files import CLIENT, SERVER, Shop, later, opened

pytestmark = pytest.mark.needs("openssl")


def checked(block: dict[str, Any], **more: Any) -> list[Note]:
    with opened(block, **more) as authority:
        return list(authority.check())


def about(notes: list[Note], level: NoteLevel) -> list[str]:
    return [note.about for note in notes if note.level is level]


def ca_of(shop: Shop, name: str) -> dict[str, Any]:
    return {"ca_cert": shop.path(f"{name}.pem"), "ca_key": shop.path(f"{name}.key")}


def test_a_ca_is_described(usual: Shop) -> None:
    ca, key, anchor = checked(ca_of(usual, "root"))
    assert {note.level for note in (ca, key, anchor)} == {NoteLevel.OK}
    assert (ca.about, ca.path) == ("ca", "ca_cert")
    assert ca.message.startswith('"CN=root,O=Operator" (sha256 ')
    assert " signs with EC P-256, valid until 20" in ca.message
    assert (key.about, key.path) == ("key", "ca_key")
    assert key.message.startswith(f"the key in {usual.path('root.key')} fits ")
    assert key.message.endswith("; it is not encrypted")
    assert (anchor.about, anchor.path) == ("anchor", "ca_cert")
    assert anchor.message == "the CA itself is the anchor"


def test_the_anchor_of_a_chain_is_named(usual: Shop) -> None:
    notes = checked(ca_of(usual, "policy"), anchors=[usual.path("root.pem")])
    assert notes[2].path == "anchors"
    assert notes[2].message.startswith('the chain leads to "CN=root,O=Operator" (sha256 ')
    assert about(notes, NoteLevel.WARNING) == []


def test_a_ca_that_ends_within_thirty_days_is_a_warning(shop: Shop) -> None:
    shop.root("ca", days=40)
    assert about(checked(ca_of(shop, "ca"), clock=later(days=9)), NoteLevel.WARNING) == []
    *_, warning = checked(ca_of(shop, "ca"), clock=later(days=12))
    assert (warning.level, warning.about, warning.path) == (NoteLevel.WARNING, "ca", "ca_cert")
    assert warning.message.startswith('"CN=ca,O=Operator" (sha256 ')
    assert f"in {shop.path('ca.pem')} expires at 20" in warning.message
    assert warning.message.endswith(", in 27 days")
    *_, warning = checked(ca_of(shop, "ca"), clock=later(days=39.5))
    assert warning.message.endswith(", in 12 hours")


def test_what_is_above_the_ca_is_watched_too(shop: Shop) -> None:
    shop.root("root", days=10)
    shop.issue("ca", by="root", days=100)
    notes = checked(ca_of(shop, "ca"), anchors=[shop.path("root.pem")])
    assert [note.path for note in notes if note.level is NoteLevel.WARNING] == ["anchors"]


def test_a_ca_in_two_settings_is_mentioned_once(shop: Shop) -> None:
    shop.root("ca", days=10)
    notes = checked(ca_of(shop, "ca"), anchors=[shop.path("ca.pem")])
    assert about(notes, NoteLevel.WARNING) == ["ca"]


def test_a_passphrase_that_nothing_needs_is_a_warning(usual: Shop) -> None:
    notes = checked(ca_of(usual, "root"), ca_key_passphrase={"env": "UNSET"})
    (warning,) = [note for note in notes if note.level is NoteLevel.WARNING]
    assert warning.path == "ca_key_passphrase"
    assert warning.message == f"has no effect: the key in {usual.path('root.key')} is not encrypted"


def test_an_encrypted_key_is_called_encrypted(usual: Shop, shop: Shop) -> None:
    written = shop.openssl("pkcs8", "-topk8", "-passout", "pass:x", given=usual.read("root.key"))
    block = {"ca_cert": usual.path("root.pem"), "ca_key": shop.write("ca.key", written)}
    notes = checked(block, ca_key_passphrase={"env": "X"}, environ={"X": "x"})
    assert notes[1].message.endswith("; it is encrypted")
    assert about(notes, NoteLevel.WARNING) == []


def pairs_of(shop: Shop) -> dict[str, Any]:
    ends = {
        f"{end}_{part}": shop.path(f"{end}.{suffix}")
        for end in ("server", "client")
        for part, suffix in (("cert", "pem"), ("key", "key"))
    }
    return {"ca_cert": shop.path("ca.pem"), **ends}


def test_finished_certificates_are_described(usual: Shop) -> None:
    notes = checked({**pairs_of(usual), "ca_cert": usual.path("builds.pem")})
    assert about(notes, NoteLevel.OK) == ["server", "server key", "client", "client key", "anchor"]
    assert about(notes, NoteLevel.WARNING) == []
    assert " for builds.example.com, valid until 20" in notes[0].message
    assert [note.path for note in notes] == [
        "server_cert",
        "server_key",
        "client_cert",
        "client_key",
        "ca_cert",
    ]


def test_finished_certificates_that_end_soon_are_warnings(shop: Shop) -> None:
    shop.root("ca", days=20)
    shop.issue("server", "ca", SERVER, days=300)
    shop.issue("client", "ca", CLIENT, days=3)
    # three days are a third of nine: the client's is fine when new, the CA's never with twenty
    assert about(checked(pairs_of(shop)), NoteLevel.WARNING) == ["anchor"]
    warned = about(checked(pairs_of(shop), clock=later(days=2.5)), NoteLevel.WARNING)
    assert warned == ["client", "anchor"]


def test_a_passphrase_that_a_pair_does_not_need_is_a_warning(usual: Shop) -> None:
    block = {**pairs_of(usual), "ca_cert": usual.path("builds.pem")}
    notes = checked(block, client_key_passphrase={"env": "UNSET"})
    assert [note.path for note in notes if note.level is NoteLevel.WARNING] == ["client_key_passphrase"]
