"""Fixtures: the conftest.py of all tests imports them.

With the hook among them a failure shows the logs of the servers that the test used.
A test of a shared server mounts its CA at a path of its own (`unique`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

import pytest

from baoserver.cluster import RaftCluster
from baoserver.server import DevServer, Server, StoredServer

_numbers = count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of the servers' logs to the report of a failure."""
    report = yield
    for used in item.funcargs.values() if report.failed else ():
        for server in used.nodes if isinstance(used, RaftCluster) else [used]:
            if isinstance(server, Server):
                report.sections.append((f"log of {server.address}", server.log[-8000:]))
    return report


@pytest.fixture
def unique() -> str:
    """A name that no other test of this process has: for mounts, roles, policies."""
    return f"t{next(_numbers)}"


@pytest.fixture(scope="session")
def dev_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    """A dev server for all tests of this process; don't seal it, don't stop it."""
    with DevServer(tmp_path_factory.mktemp("bao")) as server, _sharing(dev_server=server):
        yield server


@pytest.fixture(scope="session")
def dev_tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    """A dev server with TLS for all tests of this process."""
    with DevServer(tmp_path_factory.mktemp("bao"), tls=True) as server, _sharing(dev_tls_server=server):
        yield server


_shared: dict[str, Server] = {}  # by the names of their fixtures


@contextmanager
def _sharing(**servers: Server) -> Iterator[None]:
    _shared.update(servers)
    try:
        yield
    finally:
        for name in servers:
            del _shared[name]


@pytest.fixture
def stored_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredServer]:
    """A server of this test's own, with its data on disk: seal it, stop it, start it again."""
    with StoredServer(tmp_path_factory.mktemp("bao")) as server:
        yield server


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RaftCluster]:
    """Three nodes, healthy before and after the test.

    It takes seconds to make; mark its tests ``@pytest.mark.xdist_group("raft")`` so that one
    process makes it, and ends it after the last of them.
    """
    if not _clusters:
        _clusters.append(_until_the_last.enter_context(RaftCluster(tmp_path_factory.mktemp("bao"))))
    yield _clusters[0]
    _clusters[0].heal()


_clusters: list[RaftCluster] = []  # the one that runs
_until_the_last = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Generator[None]:
    """End the cluster when no test of its group comes next, and suspend servers that it has no use for.

    Idle, the cluster takes a twentieth of a processor, and each server a hundredth, until the end.
    """
    yield
    for name, server in _shared.items():
        if nextitem is None or name in getattr(nextitem, "fixturenames", ()):
            server.process.resume()
        else:
            server.process.suspend()
    group = None if nextitem is None else nextitem.get_closest_marker("xdist_group")
    if group is None or group.args[0] != "raft":
        _clusters.clear()
        _until_the_last.close()
