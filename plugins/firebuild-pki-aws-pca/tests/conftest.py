"""Fixtures of the tests of the provider aws-pca."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # these tests also run from the root of firebuild

from pca_servers import Server, serving


@pytest.fixture(scope="session")
def running() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    """The server, well-behaved."""
    running.behave()
    return running


@pytest.fixture(scope="session")
def root(running: Server) -> str:
    """A root CA with a P-256 key, in short-lived mode."""
    running.behave()
    return running.make("Builds root", "EC_prime256v1", mode="SHORT_LIVED_CERTIFICATE")


@pytest.fixture(scope="session")
def subordinate(running: Server) -> str:
    """A CA with an RSA key below a root with a P-384 key."""
    running.behave()
    above = running.make("Example root", "EC_secp384r1", days=3650)
    return running.make("Builds CA", "RSA_2048", below=above)
