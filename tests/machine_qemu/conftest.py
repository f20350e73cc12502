from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.sandbox import Runtime, Sandbox, detect, find_runtime
from machine_qemu.kernels import find_test_kernel


@pytest.fixture(scope="session")
def kernel() -> Path:
    return find_test_kernel()


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return Sandbox(detect())


@pytest.fixture(scope="session")
def runtime() -> Runtime:
    return find_runtime()
