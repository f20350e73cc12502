"""QEMU's command line (qemu(1), docs/system/i386/microvm.rst)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.sandbox import Bind
from firebuild_pki.values import dataclass

PROGRAM: Final = "qemu-system-x86_64"
# The guest's network: this machine's loopback interface is at the address of the metadata service.
HOST: Final = "169.254.169.254"
GUEST: Final = "169.254.0.15/16"
_NETWORK: Final = f"user,id=n0,ipv6=off,net=169.254.0.0/16,host={HOST}"
_MIB: Final = 1 << 20
# System calls that QEMU never needs are forbidden to it.
CONFINED: Final = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
# Where a sandbox already sees the programs of the host.
_SHOWN: Final = ("/usr", "/nix/store", "/gnu/store")


class Accelerator(StrEnum):
    """What executes the guest's code: the processor, or software."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True)
class Program:
    """QEMU itself.

    Args:
        path: the program, without links on the way.
    """

    path: Path

    @property
    def binds(self) -> tuple[Bind, ...]:
        """What a sandbox has to show besides the programs of the host."""
        if self.path.is_relative_to(_SHOWN[0]) or any(self.path.is_relative_to(place) for place in _SHOWN):
            return ()
        data = self.path.parent.parent / "share/qemu"
        return (Bind(self.path), *((Bind(data),) if data.is_dir() else ()))


def find_program(name: str = PROGRAM) -> Program:
    """Find QEMU by its path, or by its name on PATH.

    Raises:
        InputError: there is none.
    """
    found = shutil.which(os.path.expanduser(name))
    if found is None:
        raise InputError(
            f"QEMU was not found: there is no program {name}",
            hint="install it (Debian: the package qemu-system-x86), or set machine.qemu.program to its path",
        )
    return Program(Path(found).resolve())


@dataclass(frozen=True)
class Hardware:
    """The virtual hardware.

    Args:
        accelerator: KVM, or TCG where that doesn't work.
        memory: bytes.
        cpus: virtual processors.
    """

    accelerator: Accelerator
    memory: int
    cpus: int = 1


def bare_command(program: Program, hardware: Hardware, kernel: str, append: str) -> list[str]:
    """Return the command for a machine with a kernel and a serial console on stdout, and nothing else.

    Args:
        kernel: its path in the sandbox.
        append: the kernel's command line.
    """
    cpu = "host" if hardware.accelerator is Accelerator.KVM else "max"
    return [
        str(program.path),
        *("-M", "microvm,rtc=on", "-accel", hardware.accelerator.value, "-cpu", cpu),
        *("-smp", str(hardware.cpus), "-m", f"{hardware.memory // _MIB}M"),
        *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *CONFINED,
        *("-kernel", kernel, "-append", append),
    ]


def machine_command(
    program: Program,
    hardware: Hardware,
    *,
    kernel: str,
    initrd: str,
    snapshot: str,
    drives: Sequence[str],
    append: str,
    forwards: Sequence[str] = (),
) -> list[str]:
    """Return the command for a machine that builds; the paths are those in the sandbox.

    Args:
        snapshot: the first drive, read-only.
        drives: the others.
        forwards: from the machine's network namespace to the guest, each as QEMU's `hostfwd`.
    """
    # The host reads nothing of what is written; what is kept it has in its own cache.
    writable = "if=none,format=raw,cache=unsafe,discard=unmap,werror=report"
    files = [
        f"if=none,format=raw,readonly=on,file={snapshot}",
        *(f"{writable},file={path}" for path in drives),
    ]
    blocks: list[str] = []
    for number, file in enumerate(files):
        blocks += ["-drive", f"id=drive{number},{file}", "-device", f"virtio-blk-device,drive=drive{number}"]
    return [
        *bare_command(program, hardware, kernel, append),
        *("-initrd", initrd),
        *blocks,
        *("-netdev", ",hostfwd=".join((_NETWORK, *forwards)), "-device", "virtio-net-device,netdev=n0"),
        *("-device", "virtio-rng-device"),
    ]
