"""Fixtures of the preflight's tests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from firebuild_pki.keys import generate_key, private_key_pem
from pki.tools import CLIENT_AUTH, SERVER_AUTH, OperatorCA, pem


@pytest.fixture
def ready_pairs(tmp_path: Path) -> Mapping[str, Path]:
    """Finished certificates for the provider `file`, each good for both ends."""
    now = datetime.now(UTC)
    ca = OperatorCA(valid=(now - timedelta(days=1), now + timedelta(days=365)))
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca_cert", "server_cert", "client_cert")}
    paths["ca_cert"].write_bytes(ca.pem)
    for end in ("server", "client"):
        key = generate_key()
        valid = (now - timedelta(hours=1), now + timedelta(days=90))
        leaf = ca.leaf(key.public_key(), ["both.example.org"], usages=[SERVER_AUTH, CLIENT_AUTH], valid=valid)
        paths[f"{end}_cert"].write_bytes(pem(leaf))
        paths[f"{end}_key"] = tmp_path / f"{end}_key.pem"
        paths[f"{end}_key"].touch(mode=0o600)
        paths[f"{end}_key"].write_bytes(private_key_pem(key))
    return paths
