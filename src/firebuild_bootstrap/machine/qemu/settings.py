"""The block `machine.qemu` (docs/qemu.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from firebuild_bootstrap.bootstrap_settings import Address, ByteSize
from firebuild_pki.config import Settings


class QemuSettings(Settings):
    """The block `qemu` of the section `machine`."""

    program: str = "qemu-system-x86_64"
    """The program, by its path or as it is found on PATH."""
    kernel: str | None = None
    """The kernel to boot, a vmlinuz or vmlinux; by default the running one of this host, or its newest."""
    kernel_modules: tuple[str, ...] = ()
    """Directories of its modules; by default lib/modules/RELEASE beside the kernel, or this host's."""
    kernel_args: tuple[str, ...] = ()
    """More arguments for the kernel."""
    initrd_compression: Literal["none", "gzip", "lz4", "zstd"] = "none"
    """How the guest's initramfs is compressed. Without, it is three times as large and boots sooner."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """KVM where a kernel was seen to start under it and software (tcg) otherwise; or always one of them."""
    vcpus: Annotated[int, Field(ge=1, le=32)] = 2
    """Processors of the machine."""
    memory: Annotated[ByteSize, Field(ge=256 << 20)] = 1 << 30
    """Memory of the machine."""
    network: Literal["none", "user"] = "none"
    """Network of RUN steps: none, or user: IPv4 to all but this host's loopback and link-local addresses."""
    name_servers: Annotated[tuple[Address, ...], Field(max_length=2)] = ()
    """DNS servers of RUN steps with `network: user`; by default this host's."""
    serial_log: str | None = None
    """A file for what the machine writes to its serial console, up to 16 MiB; an existing one is replaced."""
