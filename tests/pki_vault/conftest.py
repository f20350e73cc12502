"""Fixtures of the tests of the provider `vault`; the servers are real."""

from __future__ import annotations

import pytest

from baoserver import DevServer
from pki_vault.tools import Backend


@pytest.fixture(scope="session")
def backend(dev_server: DevServer) -> Backend:
    """A mount with an intermediate and a role for each end, and a token for just that."""
    return Backend.prepared(dev_server.api, "pki")


@pytest.fixture(scope="session")
def tls_backend(dev_tls_server: DevServer) -> Backend:
    """The same on a server with TLS."""
    return Backend.prepared(dev_tls_server.api, "pki")


@pytest.fixture(scope="session")
def namespaced_backend(dev_server: DevServer) -> Backend:
    """The same in a namespace below another."""
    return Backend.prepared(dev_server.api.make_namespace("org").make_namespace("team"), "pki")
