"""The kernel that virtual machines of tests boot, and what made-up kernels look like."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# Where tests/initramfs/fetch kernel puts one; TESTS_KERNEL names another place of the same form.
_KERNEL = Path("/var/cache/firebuild-tests/kernel")


def find_test_kernel() -> Path:
    """Return the kernel to boot; skip the test, or fail in CI, where there is none or no QEMU."""
    require_qemu()
    kernel = kernel_of_tests()
    require(kernel, "needs a kernel: tests/initramfs/fetch kernel")
    assert kernel is not None
    return kernel


def kernel_of_tests() -> Path | None:
    """Return the kernel to boot where there is one, and QEMU."""
    root = Path(os.environ.get("TESTS_KERNEL", _KERNEL))
    images = sorted(root.glob("boot/vmlinuz-*"))
    return images[-1] if images and shutil.which("qemu-system-x86_64") else None


def require_qemu() -> None:
    """Skip the test, or fail in CI, where there is no QEMU."""
    require(shutil.which("qemu-system-x86_64"), "needs qemu-system-x86_64: apt install qemu-system-x86")


def require(what: object, reason: str) -> None:
    """Skip the test, or fail in CI, where something is missing."""
    if what:
        return
    if os.environ.get("TESTS_REQUIRE_ALL"):
        pytest.fail(reason)
    pytest.skip(reason)


def bzimage(version: str) -> bytes:
    """The header of a compressed kernel that says which one it is."""
    image = bytearray(0x400)
    image[0x202:0x206] = b"HdrS"
    image[0x20E:0x210] = (0x100).to_bytes(2, "little")
    image[0x300 : 0x300 + len(version) + 1] = version.encode() + b"\0"
    return bytes(image)


def vmlinux(banner: str, machine: int = 62) -> bytes:
    """An uncompressed kernel with its banner somewhere in it."""
    header = b"\x7fELF".ljust(18, b"\0") + machine.to_bytes(2, "little")
    return header.ljust(100, b"\0") + banner.encode() + bytes(100)


def host_with(root: Path, *releases: str, modules: tuple[str, ...]) -> Path:
    """A root directory with kernels in /boot, and modules for some of them."""
    (root / "boot").mkdir(parents=True)
    for release in releases:
        (root / f"boot/vmlinuz-{release}").write_bytes(bzimage(f"{release} (me@there) #1"))
    for release in modules:
        (root / "lib/modules" / release).mkdir(parents=True)
    return root
