"""The kernel's command line for a machine that runs the initramfs (docs/initramfs.md)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from firebuild_bootstrap.errors import InputError

# Without it, a kernel under software emulation measures its clock, and now and then never ends doing so.
EMULATED: Final = ("tsc_early_khz=2600000",)


@dataclass(frozen=True)
class StaticAddress:
    """The network of a machine.

    Args:
        interface: its IPv4 address with the prefix length, such as `172.16.0.2/30`.
        gateway: the default route; None for none.
        device: name of the interface; empty for the first one.
        name_servers: up to two.
    """

    interface: str = "169.254.0.15/16"
    gateway: str | None = None
    device: str = ""
    name_servers: tuple[str, ...] = ()

    def argument(self) -> str:
        """Return the value of `ip=`.

        Raises:
            InputError: an address is none.
        """
        try:
            interface = ipaddress.IPv4Interface(self.interface)
            gateway = str(ipaddress.IPv4Address(self.gateway)) if self.gateway else ""
            servers = ":".join(str(ipaddress.IPv4Address(server)) for server in self.name_servers[:2])
        except ValueError as error:
            raise InputError(f"the machine's network: {error}") from error
        return f"{interface.ip}::{gateway}:{interface.netmask}::{self.device}:off:{servers}".rstrip(":")


def kernel_arguments(
    *,
    console: str = "ttyS0",
    reboot: str = "t",
    network: StaticAddress | None = StaticAddress(),
    root: str = "/dev/vda",
    scratch: str = "",
    caches: Sequence[str] = (),
    mmds: str = "http://169.254.169.254",
    mmds_timeout: float = 30.0,
    connect_timeout: float = 30.0,
    extra: Sequence[str] = (),
) -> str:
    """Return the command line.

    Args:
        console: where the initramfs reports to.
        reboot: how the kernel resets the machine, which ends the hypervisor: `k` for Firecracker, `t` for
            QEMU's microvm and q35 (with `-no-reboot`).
        network: fixed addresses; None asks by DHCP.
        root: the drive with the image; read-only where there is a scratch drive.
        scratch: an empty drive for what the steps change; without one they change the image's.
        caches: names of cache mounts (guest/caches.py), whose drives follow the scratch drive.
        mmds: the metadata service.
        mmds_timeout: seconds to wait for it.
        connect_timeout: seconds to wait for the bootstrap server.
        extra: more arguments; `EMULATED` without KVM.

    Raises:
        InputError: a value can't be written on a command line.
    """
    words = [
        f"console={console}",
        f"reboot={reboot}",
        "panic=-1",
        "quiet",
        "random.trust_cpu=on",
        f"ip={network.argument() if network else 'dhcp'}",
        f"firebuild.root={root}",
        *([f"firebuild.scratch={scratch}"] if scratch else []),
        *([f"firebuild.caches={','.join(caches)}"] if caches else []),
        f"firebuild.mmds={mmds}",
        f"firebuild.mmds_timeout={mmds_timeout:g}",
        f"firebuild.connect_timeout={connect_timeout:g}",
        *extra,
    ]
    for word in words:
        if not word.isascii() or any(letter.isspace() or letter in "\"'\0" for letter in word):
            raise InputError(
                f"{word!r} can't be an argument of a kernel: it holds a space, a quote or the like"
            )
    return " ".join(words)
