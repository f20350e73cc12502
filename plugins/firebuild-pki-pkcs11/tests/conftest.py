"""Fixtures of the tests of the key store pkcs11."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from firebuild_pki import KeyStoreContext

from firebuild_pki_pkcs11.tokens import TokenKey, open_token_key

sys.path.insert(0, str(Path(__file__).parent))  # these tests also run from the root of firebuild

from softhsm import MODULE, PIN, make_tokens


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs SoftHSM where it is not installed; in CI nothing may be missing."""
    if next(item.iter_markers("needs"), None) and not MODULE:
        reason = "needs softhsm2: apt install softhsm2"
        (pytest.fail if os.environ.get("TESTS_REQUIRE_ALL") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tokens `ca` and `spare`."""
    make_tokens(tmp_path_factory.mktemp("softhsm"))


@pytest.fixture
def opening(tokens: None) -> Callable[[str], TokenKey]:
    """Opens the key of a URI with the right PIN."""
    return lambda text: open_token_key(text, KeyStoreContext(lambda: PIN))
