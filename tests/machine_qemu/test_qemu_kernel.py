"""Which kernel a machine boots, and what is said where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.qemu.kernel import Kernel, find_kernel, read_release
from machine_qemu.kernels import bzimage, host_with, vmlinux

BANNER = "Linux version %s (%s) (%s)\0 Linux version 5.10.225 (root@there) (gcc) #1 SMP"


@pytest.mark.parametrize(
    ("content", "release"),
    [
        (bzimage("6.1.0-56-cloud-amd64 (debian@there) #1 SMP"), "6.1.0-56-cloud-amd64"),
        (bzimage("no number"), ""),
        (bzimage("6.1.0-56")[:0x206], ""),  # cut off behind the magic number
        (vmlinux(BANNER), "5.10.225"),
        (vmlinux("nothing"), ""),
    ],
)
def test_the_release_is_read_from_the_image(tmp_path: Path, content: bytes, release: str) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(content)
    assert read_release(image) == release


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", vmlinux(BANNER, machine=183), b"\x7fELF"])
def test_what_is_no_kernel_for_this_machine_is_refused(tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "kernel"
    image.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_release(image)
    assert str(image) in refused.value.message
    assert "dpkg -x" in (refused.value.hint or "")


def test_a_kernel_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone can't be read: No such file or directory"):
        find_kernel(tmp_path / "gone")
    with pytest.raises(InputError, match="nobody-here/vmlinuz can't be read: No such file or directory"):
        find_kernel(Path("~nobody-here/vmlinuz"))


@pytest.mark.parametrize("where", ["lib/modules", "usr/lib/modules"])
def test_modules_are_found_beside_the_kernel(tmp_path: Path, where: str) -> None:
    root = host_with(tmp_path / "unpacked", "6.1.0-1", modules=())
    modules = root / where / "6.1.0-1"
    modules.mkdir(parents=True)
    image = root / "boot/vmlinuz-6.1.0-1"
    assert find_kernel(image, root=tmp_path) == Kernel(image, "6.1.0-1", (modules,))


def test_modules_are_found_on_the_host(tmp_path: Path) -> None:
    host = host_with(tmp_path / "host", modules=("6.1.0-1",))
    image = host_with(tmp_path / "other", "6.1.0-1", modules=()) / "boot/vmlinuz-6.1.0-1"
    assert find_kernel(image, root=host).modules == (host / "lib/modules/6.1.0-1",)


def test_a_kernel_without_modules_has_everything_built_in(tmp_path: Path) -> None:
    image = host_with(tmp_path, "6.1.0-1", modules=()) / "boot/vmlinuz-6.1.0-1"
    assert find_kernel(image, root=tmp_path).modules == ()
    image.write_bytes(bzimage("?"))
    assert find_kernel(image, root=tmp_path).modules == ()


def test_named_modules_win_and_have_to_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host_with(tmp_path, "6.1.0-1", modules=("6.1.0-1",))
    image, mine = root / "boot/vmlinuz-6.1.0-1", tmp_path / "mine"
    with pytest.raises(
        InputError,
        match=r"qemu\.kernel_modules: .*/mine is not a directory\n  hint: name the directory",
    ):
        find_kernel(image, [mine], root=root)
    mine.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_kernel(image, [Path("~/mine")], root=root).modules == (mine,)


def test_this_hosts_newest_kernel_with_modules_is_taken(tmp_path: Path) -> None:
    host = host_with(tmp_path, "6.9.1", "6.10.1", "6.11.0", modules=("6.9.1", "6.10.1"))
    assert find_kernel(None, root=host).release == "6.10.1"


def test_the_running_kernel_is_preferred(tmp_path: Path) -> None:
    running = os.uname().release
    host = host_with(tmp_path, "99.1", running, modules=("99.1", running))
    assert find_kernel(None, root=host).release == running


def test_without_a_kernel_the_user_hears_how_to_get_one(tmp_path: Path) -> None:
    host = host_with(tmp_path, "6.1.0-1", modules=())
    (host / "boot/vmlinuz-bad").write_bytes(b"bad")
    with pytest.raises(InputError) as refused:
        find_kernel(None, root=host)
    assert "machine.qemu.kernel is not set" in refused.value.message
    assert "vmlinuz-6.1.0-1 has no modules in" in refused.value.message
    assert "vmlinuz-bad is not a Linux kernel" in refused.value.message
    assert "apt-get download" in (refused.value.hint or "")
    with pytest.raises(InputError, match="/boot holds none"):
        find_kernel(None, root=tmp_path / "empty")
