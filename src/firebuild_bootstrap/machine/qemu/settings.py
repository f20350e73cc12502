"""The block `machine.qemu` (docs/qemu.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from firebuild_bootstrap.bootstrap_settings import Address, ByteSize
from firebuild_pki.config import Settings


class QemuSettings(Settings):
    """The block `qemu` of the section `machine`."""

    program: str = "qemu-system-x86_64"
    """The program, by its path or its name on PATH."""
    kernel: str | None = None
    """The kernel to boot, a vmlinuz or vmlinux; by default the running one of this host, or its newest."""
    kernel_modules: tuple[str, ...] = ()
    """Directories of its modules; by default lib/modules/RELEASE beside the kernel, or this host's."""
    kernel_args: tuple[str, ...] = ()
    """More arguments for the kernel."""
    initrd_compression: Literal["none", "gzip", "lz4", "zstd"] = "none"
    """Compression of the guest's initramfs; `none` is three times as large and boots sooner."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    """`auto`: KVM if a trial boot succeeded with it, else software (tcg); or always one of them."""
    vcpus: Annotated[int, Field(ge=1, le=32)] = 2
    """Processors of the machine."""
    memory: Annotated[ByteSize, Field(ge=256 << 20)] = 1 << 30
    """Memory of the machine."""
    network: Literal["none", "user"] = "none"
    """Network of RUN steps: none; or user, IPv4 without this host's loopback and link-local addresses."""
    name_servers: Annotated[tuple[Address, ...], Field(max_length=2)] = ()
    """DNS servers of RUN steps with `network: user`; by default this host's."""
    serial_log: str | None = None
    """A file for the output of the serial console, up to 16 MiB; an existing one is replaced."""
