"""The initramfs for tests, made once for all workers, and the kernel to boot it with."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_ext4
from firebuild_bootstrap.initramfs import initramfs_image
from firebuild_bootstrap.layers.tree import tree_entries
from guest.build import make_image
from initramfs.archives import Found, read_initramfs, unpack

# Where `fetch kernel` puts one; TESTS_KERNEL names another place of the same form.
KERNEL = Path("/var/cache/firebuild-tests/kernel")


@dataclass(frozen=True)
class Kernel:
    """A kernel to boot, and its modules."""

    image: Path
    modules: Path


@pytest.fixture(scope="session")
def kernel() -> Kernel:
    root = Path(os.environ.get("TESTS_KERNEL", KERNEL))
    images = sorted(root.glob("boot/vmlinuz-*"))
    if not images or shutil.which("qemu-system-x86_64") is None:
        reason = f"needs qemu: apt install qemu-system-x86, and tests/initramfs/fetch kernel {root}"
        if os.environ.get("TESTS_REQUIRE_ALL"):
            pytest.fail(reason)
        pytest.skip(reason)
    return Kernel(images[-1], root / "lib/modules" / images[-1].name.removeprefix("vmlinuz-"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that all workers share."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return shared / "initramfs-store"


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Keep two workers from doing the same work."""
    store.mkdir(exist_ok=True)
    with (store / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def initramfs(store: Path) -> Path:
    """The initramfs without kernel modules."""
    with alone(store):
        return initramfs_image(store)


@pytest.fixture(scope="session")
def entries(initramfs: Path) -> list[Found]:
    return read_initramfs(initramfs)


@pytest.fixture(scope="session")
def tree(entries: list[Found], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The initramfs unpacked; not to be changed."""
    return unpack(entries, tmp_path_factory.mktemp("initramfs") / "tree")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A build context with a Dockerfile to be written, and a file."""
    folder = tmp_path / "context"
    folder.mkdir()
    (folder / "hello.txt").write_text("hello from the context\n")
    return folder


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    """A small system without Python on a drive, with about 8 MiB of free space."""
    files = tree_entries(str(make_image(tmp_path / "root")))
    make_ext4(files, str(tmp_path / "drive.img"), Ext4Options(free=8 << 20))
    return tmp_path / "drive.img"
