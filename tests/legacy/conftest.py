"""Certificates, a sandbox and a build context for guests and servers of both ages."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.sandbox import IdMap, Runtime
from firebuild_pki import TLSMaterial, open_authority
from guest.conftest import build, pki, server, single_idmap
from legacy.house import House
from service.conftest import serve, short_path

__all__ = ["build", "pki", "serve", "server", "short_path", "single_idmap"]


@pytest.fixture(scope="session")
def materials() -> tuple[TLSMaterial, TLSMaterial]:
    with open_authority(build_id="b1") as authority:
        return authority.issue_server(), authority.issue_guest()


@pytest.fixture
def house(
    tmp_path: Path, materials: tuple[TLSMaterial, TLSMaterial], runtime: Runtime, idmap: IdMap
) -> House:
    return House(tmp_path, materials, runtime, idmap)
