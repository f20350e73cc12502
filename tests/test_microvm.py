"""Kernels for Firecracker: an uncompressed one as it is, and out of a bzImage in each form that Linux has."""

from __future__ import annotations

import lzma
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings
from firebuild_bootstrap.microvm import _configuration, _modules, read_kernel

VMLINUX = b"\x7fELF" + bytes(range(256)) * 500
SIZE = struct.pack("<I", len(VMLINUX))  # what the kernel's build adds after all forms but gzip


def bzimage(payload: bytes, sectors: int = 3) -> bytes:
    """A compressed kernel with its header; boot.rst of Linux."""
    image = bytearray((sectors + 1) * 512)
    image[0x1F1] = sectors
    image[0x202:0x206] = b"HdrS"
    image[0x248:0x250] = struct.pack("<II", 100, len(payload))
    return bytes(image) + bytes(100) + payload + b"what follows"


def lz4(data: bytes) -> bytes:
    return subprocess.run(["lz4", "-l", "-z", "-c"], input=data, capture_output=True, check=True).stdout


def gzip(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=31)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    "compress",
    [
        gzip,
        lambda data: lzma.compress(data) + SIZE,
        lambda data: lzma.compress(data, lzma.FORMAT_ALONE) + SIZE,
        lambda data: zstandard.compress(data) + SIZE,
        lambda data: lz4(data) + SIZE,
    ],
    ids=["gzip", "xz", "lzma", "zstd", "lz4"],
)
def test_a_compressed_kernel_is_unpacked(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(bzimage(compress(VMLINUX)))
    assert read_kernel(path, "x86_64", "--kernel") == VMLINUX
    path.write_bytes(VMLINUX)
    assert read_kernel(path, "x86_64", "--kernel") == VMLINUX


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (bzimage(gzip(b"no ELF")), "holds no vmlinux"),
        (bzimage(gzip(VMLINUX)[:40] + b"\xff" * 80), "is damaged"),
        (bzimage(gzip(VMLINUX))[:-20], "is damaged: it is cut off after"),
        (bzimage(gzip(VMLINUX))[:0x24C], "is damaged: it is cut off after 588 bytes"),
        (bzimage(b"\x02\x21\x4c\x18" + b"\xff" * 80), "is damaged: lz4 failed"),
        (bzimage(b"BZh9"), "is compressed in a form that is not read here"),
        (b"text", "expected an uncompressed kernel"),
    ],
    ids=["no-elf", "damaged", "cut-off", "no-header", "lz4", "bzip2", "text"],
)
def test_what_is_no_kernel_is_refused(tmp_path: Path, image: bytes, error: str) -> None:
    (tmp_path / "vmlinuz").write_bytes(image)
    with pytest.raises(InputError, match=f"^--kernel: .*{error}"):
        read_kernel(tmp_path / "vmlinuz", "x86_64", "--kernel")
    with pytest.raises(InputError, match=r"^--kernel: .*/none can't be read: No such file"):
        read_kernel(tmp_path / "none", "x86_64", "--kernel")


def test_a_kernel_for_arm_is_an_image(tmp_path: Path) -> None:
    image = bytes(0x38) + b"ARM\x64" + bytes(100)
    (tmp_path / "Image").write_bytes(image)
    assert read_kernel(tmp_path / "Image", "aarch64", "--kernel") == image


def test_the_modules_of_a_kernel_for_arm_lie_beside_it(tmp_path: Path) -> None:
    kernel, modules = tmp_path / "boot/Image", tmp_path / "lib/modules/6.12.9-arm64"
    kernel.parent.mkdir()
    modules.mkdir(parents=True)
    image = bytes(0x38) + b"ARM\x64" + bytes(100) + b"Linux version 6.12.9-arm64 (someone@somewhere)"
    kernel.write_bytes(image)
    content = read_kernel(kernel, "aarch64", "--kernel")
    assert _modules(kernel, content, ()) == (modules,)
    assert _modules(kernel, content, [str(tmp_path)]) == (tmp_path,)
    assert _modules(kernel, bytes(100), ()) == ()


def test_the_machine_is_as_that_of_builds() -> None:
    settings = FirecrackerSettings(vcpus=4, memory=1 << 30, smt=True, cpu_template="T2")
    machine = _configuration(settings, "quiet")["machine-config"]
    assert machine == {"vcpu_count": 4, "mem_size_mib": 1024, "smt": True, "cpu_template": "T2"}
