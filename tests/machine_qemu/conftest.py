from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from firebuild_bootstrap.sandbox import Sandbox, detect
from machine_qemu.images import busybox_base
from machine_qemu.kernels import find_test_kernel
from support import Firebuild


@pytest.fixture(scope="session")
def kernel() -> Path:
    return find_test_kernel()


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    return Sandbox(detect())


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the base `busybox`, and with all that builds here have made."""
    home = tmp_path_factory.mktemp("home")
    (home / "initramfs").mkdir()
    Firebuild(home)("base", "import", "busybox", busybox_base(tmp_path_factory.mktemp("base")))
    return home


@pytest.fixture
def firebuild(shared: Path) -> Firebuild:
    return Firebuild(shared)


@pytest.fixture
def configure(tmp_path: Path, kernel: Path) -> Any:
    """Writes a configuration with the test's kernel and what else is said."""

    def write(
        ca: dict[str, Any] | None = None, disk_size: str | None = None, ids: str = "auto", **qemu: Any
    ) -> Path:
        block = {"kernel": str(kernel), "serial_log": str(tmp_path / "serial"), **qemu}
        machine = {"driver": "qemu", "ids": ids, "disk_size": disk_size, "qemu": block}
        config = tmp_path / "config.yaml"
        bootstrap = {"initial_timeout": "3m"}  # a busy host boots slowly in software
        document = {"machine": machine, "bootstrap": bootstrap, **({"ca": ca} if ca else {})}
        config.write_text(yaml.safe_dump(document))
        return config

    return write
