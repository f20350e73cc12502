"""Certificates from a real server, through the framework."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baoserver import StoredServer
from firebuild_pki import NoteLevel, open_authority
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


class Audited(StoredServer):
    """A server that writes what it is asked into a file."""

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def configuration(self) -> dict[str, Any]:
        device = {"type": "file", "path": "to-file", "options": {"file_path": str(self.audit_log)}}
        return {**super().configuration(), "audit": [device]}


def test_the_servers_audit_log_tells_what_a_certificate_is_for(tmp_path: Path) -> None:
    with Audited(tmp_path, storage="inmem") as server:
        backend = Backend.prepared(server.api, "pki")
        for name in ("build", "tag", "requester"):
            server.api.write(f"sys/config/auditing/request-headers/x-firebuild-{name}", hmac=False)
        labels = {"tag": "shop/web:1.2", "requester": "ci@builder-7"}
        settings = backend.settings()
        with open_authority(settings, build_id="b7", environ=backend.environ, labels=labels) as authority:
            authority.issue_server()
        told = [json.loads(line)["request"] for line in server.audit_log.read_text().splitlines()]
    (headers,) = {json.dumps(one["headers"]) for one in told if one["path"] == "pki/sign/server"}
    assert json.loads(headers) == {
        "x-firebuild-build": ["b7"],
        "x-firebuild-tag": ["shop/web:1.2"],
        "x-firebuild-requester": ["ci@builder-7"],
    }


def test_the_check_looks_at_everything(backend: Backend) -> None:
    with backend.open() as authority:
        notes = authority.check()
    assert {note.about for note in notes} == {"reachable", "clock", "credentials", "role", "ca"}
    assert {note.level for note in notes} == {NoteLevel.OK}
