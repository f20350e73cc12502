"""Fixtures of the tests of the provider cfssl."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # these tests also run from the root of firebuild

from cfssl_servers import LABEL, Pki, make_pki, multirootca, serving
from stub_server import Stub, running


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a cfssl that is not installed; in CI nothing may be missing."""
    for marker in item.iter_markers("needs"):
        missing = [name for name in marker.args if shutil.which(name) is None]
        if missing:
            reason = f"needs {', '.join(missing)}: apt install golang-cfssl"
            (pytest.fail if os.environ.get("TESTS_REQUIRE_ALL") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("cfssl"))


@pytest.fixture(scope="session")
def server(pki: Pki) -> Iterator[str]:
    """A `cfssl serve` whose CA is an intermediate."""
    with serving(pki) as address:
        yield address


@pytest.fixture(scope="session")
def tls_server(pki: Pki) -> Iterator[str]:
    with serving(pki, "-tls-cert", str(pki.tls), "-tls-key", str(pki.tls_key)) as address:
        yield address


@pytest.fixture(scope="session")
def mutual_tls_server(pki: Pki) -> Iterator[str]:
    tls = ("-tls-cert", str(pki.tls), "-tls-key", str(pki.tls_key), "-mutual-tls-ca", str(pki.root))
    with serving(pki, *tls, "-mutual-tls-cn", "^Example client$") as address:
        yield address


@pytest.fixture(scope="session")
def multiroot_server(pki: Pki) -> Iterator[str]:
    sections = {LABEL: "", "elsewhere": "nets = 10.255.255.0/30"}
    with multirootca(pki, sections=sections) as address:
        yield address


@pytest.fixture(scope="session")
def multiroot_tls_server(pki: Pki) -> Iterator[str]:
    """A `multirootca` with TLS and a default label."""
    tls = ("-tls-cert", str(pki.tls), "-tls-key", str(pki.tls_key))
    with multirootca(pki, "-l", LABEL, *tls) as address:
        yield address


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running(Stub()) as made:
        yield made
