"""Kernel modules: which, in which order, and what is wrong with a directory that does not have them."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.initramfs.libraries import ElfError, read_modinfo
from firebuild_bootstrap.initramfs.modules import read_modules
from initramfs.elves import make_module

WHOLE = {
    "virtio_ring": make_module(),
    "virtio": make_module(depends="virtio_ring"),
    "virtio_mmio": make_module(depends="virtio,virtio-ring"),
    "virtio_blk": make_module(depends="virtio"),
    "virtio_net": make_module(depends="virtio,net-failover"),
    "net-failover": make_module(depends=""),
    "unrelated": make_module(),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    fill(tmp_path / "6.1.0-test/kernel/drivers", WHOLE)
    return tmp_path / "6.1.0-test"


def fill(folder: Path, modules: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in modules.items():
        (folder / f"{name}.ko").write_bytes(data)


def test_what_a_module_needs_comes_before_it_and_nothing_else_comes(directory: Path) -> None:
    found = read_modules(directory)
    assert found.release == "6.1.0-test"
    assert list(found.files) == [
        *("virtio_ring.ko", "virtio.ko", "virtio_mmio.ko", "virtio_blk.ko"),
        *("net_failover.ko", "virtio_net.ko"),
    ]
    assert found.files["virtio_net.ko"] == WHOLE["virtio_net"]


def test_the_file_system_comes_with_what_it_asks_for_where_they_are_modules(directory: Path) -> None:
    softdep = ["pre: crc32c missing post: later"]
    more = {"ext4": make_module(softdep=softdep), "crc32c": make_module(), "later": make_module()}
    fill(directory / "kernel/fs", more)
    assert list(read_modules(directory).files)[-2:] == ["crc32c.ko", "ext4.ko"]


def test_modules_may_ask_for_each_other(directory: Path) -> None:
    more = {
        name: make_module(softdep=[f"pre: {other}"]) for name, other in (("ext4", "jbd2"), ("jbd2", "ext4"))
    }
    fill(directory / "kernel/fs", more)
    assert list(read_modules(directory).files)[-2:] == ["jbd2.ko", "ext4.ko"]


def test_updates_beat_the_kernels_own(directory: Path) -> None:
    newer = make_module(depends="virtio", description="newer")
    fill(directory / "updates", {"virtio_blk": newer})
    assert read_modules(directory).files["virtio_blk.ko"] == newer


def test_modules_may_lie_in_one_directory_or_be_built_in(tmp_path: Path) -> None:
    fill(tmp_path, {"virtio_net": make_module(depends="virtio")})
    names = ("virtio", "virtio_mmio", "virtio_blk")
    (tmp_path / "modules.builtin").write_text("".join(f"kernel/drivers/{name}.ko\n" for name in names))
    assert list(read_modules(tmp_path).files) == ["virtio_net.ko"]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_compressed_modules_are_unpacked(
    directory: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    path = directory / "kernel/drivers/virtio_blk.ko"
    path.with_name(path.name + suffix).write_bytes(pack(path.read_bytes()))
    path.unlink()
    assert read_modules(directory).files["virtio_blk.ko"] == WHOLE["virtio_blk"]
    path.with_name(path.name + suffix).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=rf"virtio_blk\.ko\{suffix} can't be (read|decompressed)"):
        read_modules(directory)


@pytest.mark.parametrize("name", ["virtio_blk", "virtio_net", "virtio_mmio", "net-failover"])
def test_a_missing_module_is_named(directory: Path, name: str) -> None:
    (directory / f"kernel/drivers/{name}.ko").unlink()
    with pytest.raises(InputError, match=f"has no kernel module .*{name.replace('-', '_')}"):
        read_modules(directory)


def test_a_directory_without_modules_or_of_all_kernels_is_refused(directory: Path) -> None:
    with pytest.raises(InputError, match="holds no kernel modules") as caught:
        read_modules(directory.parent)
    assert "/lib/modules/" in str(caught.value)


def test_modules_of_several_kernels_are_refused(directory: Path) -> None:
    fill(directory / "kernel/drivers", {"virtio": make_module("6.2.0-other", depends="virtio_ring")})
    with pytest.raises(InputError, match=r"several kernels: 6\.1\.0-test, 6\.2\.0-other"):
        read_modules(directory)


@pytest.mark.parametrize("data", [b"no module", make_module()[:-200]])
def test_a_broken_module_is_named(directory: Path, data: bytes) -> None:
    (directory / "kernel/drivers/virtio.ko").write_bytes(data)
    with pytest.raises(InputError, match=r"virtio\.ko: it is "):
        read_modules(directory)


def test_a_file_without_the_section_is_no_module() -> None:
    with pytest.raises(ElfError, match="not a kernel module"):
        read_modinfo(make_module().replace(b".modinfo", b".nothing"))
