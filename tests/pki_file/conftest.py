"""Files of an operator: a shop of one's own for each test, and one with the usual files for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pki_file.operator_files import CLIENT, SERVER, Shop


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """An empty directory."""
    return Shop(tmp_path)


@pytest.fixture(scope="session")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Root, two CAs below it, and a pair for each end; tests may add files, and change none."""
    shop = Shop(tmp_path_factory.mktemp("usual"))
    shop.root("root")
    shop.issue("policy", by="root")
    shop.issue("builds", by="policy")
    shop.issue("server", "builds", SERVER)
    shop.issue("client", "builds", CLIENT)
    return shop
