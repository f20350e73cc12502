"""Certificates from a real server, through the framework."""

from __future__ import annotations

import pytest

from firebuild_pki import NoteLevel
from pki.tools import certificates, leaf_of
from pki_vault.tools import Backend

pytestmark = pytest.mark.needs("bao")


def test_server_and_guest_get_certificates_without_a_warning(backend: Backend) -> None:
    with backend.open() as authority:
        server, guest = authority.issue_server(), authority.issue_guest()
        assert authority.warnings == ()
    (anchor,) = certificates(server.trust_pem)
    assert anchor == certificates(backend.pki.root_pem.encode())[0]
    for material in (server, guest):
        chain = certificates(material.certificate_chain_pem)
        assert chain[1:] == certificates(backend.pki.issuing_pem.encode())
        assert leaf_of(material).issuer == chain[1].subject


def test_the_check_looks_at_everything(backend: Backend) -> None:
    with backend.open() as authority:
        notes = authority.check()
    for n in notes:
        print(n)
    assert {note.about for note in notes} == {"reachable", "clock", "credentials", "role", "ca"}
    assert {note.level for note in notes} == {NoteLevel.OK}
