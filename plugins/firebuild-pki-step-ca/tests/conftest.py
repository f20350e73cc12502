"""Fixtures of the tests of the provider step-ca."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # these tests also run from the root of firebuild

from step_ca_servers import Pki, make_pki, program, required, serving


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a step-ca that is not there; in CI nothing may be missing."""
    if any("step-ca" in marker.args for marker in item.iter_markers("needs")) and program() is None:
        reason = "needs step-ca: plugins/firebuild-pki-step-ca/tests/fetch builds it"
        (pytest.fail if required() else pytest.skip)(reason)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return make_pki(tmp_path_factory.mktemp("step-ca"))


@pytest.fixture(scope="session")
def server(pki: Pki) -> Iterator[str]:
    with serving(pki) as address:
        yield address
