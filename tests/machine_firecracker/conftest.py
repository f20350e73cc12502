from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from firebuild_bootstrap.image.bases import BaseStore
from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.initramfs import Compression, initramfs_image
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi
from firebuild_bootstrap.sandbox import IdMap, Sandbox
from machine_firecracker.fc_tools import NetworkNamespace, install, kernel_file, serving


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, idmap: IdMap) -> Path:
    """A home of builds with the base `host`, and with an initramfs that all workers share."""
    home = tmp_path_factory.mktemp("home")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / "fc-initramfs").mkdir(exist_ok=True)
    (home / "initramfs").symlink_to(shared / "fc-initramfs")
    with (shared / "fc-initramfs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        initramfs_image(home, compression=Compression.GZIP)
    BaseStore(home, partial(Trees, Sandbox(idmap))).create_from_host("host")
    return home


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `firecracker`, `jailer` and a kernel."""
    folder = tmp_path_factory.mktemp("programs")
    install(folder / "firecracker", "fc_program")
    install(folder / "jailer", "fc_jailer")
    kernel_file(folder / "vmlinux")
    return folder


@pytest.fixture(
    params=[
        "emulator",
        pytest.param(
            "firecracker",
            marks=[
                pytest.mark.firecracker,
                pytest.mark.skipif(shutil.which("firecracker") is None, reason="firecracker is not on PATH"),
            ],
        ),
    ]
)
def program(request: pytest.FixtureRequest, programs: Path) -> Path:
    """The emulated Firecracker, or the real one."""
    found = shutil.which("firecracker")
    return Path(found) if request.param == "firecracker" and found else programs / "firecracker"


@pytest.fixture
def api(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FirecrackerApi]:
    """The API of a fresh Firecracker."""
    monkeypatch.setenv("FC_EMULATOR_TAPS", "fctest0")
    with serving([program, "--api-sock", "api.sock"], tmp_path) as made:
        yield made


@pytest.fixture
def namespace() -> Iterator[NetworkNamespace]:
    """A network namespace with a loopback interface and nothing else. Needs root."""
    made = NetworkNamespace(f"fbtest-{os.getpid()}-{secrets.token_hex(3)}")
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    made.ip("link", "set", "lo", "up")
    yield made
    subprocess.run(["ip", "netns", "delete", made.name], check=True)
