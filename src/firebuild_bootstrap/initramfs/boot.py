"""What a machine with the initramfs is told, and what it says (docs/initramfs.md).

It is told by the kernel's command line. What it says on the serial console explains how it ended, and proves
nothing: a RUN step with enough rights could write to the console as well. Whether a build succeeded is what
the guest told the bootstrap server.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Final, Self

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.guest.init_settings import PREFIX
from firebuild_pki.values import dataclass

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
            InputError: an address is malformed.
        """
        try:
            interface = ipaddress.IPv4Interface(self.interface)
            gateway = str(ipaddress.IPv4Address(self.gateway)) if self.gateway else ""
            servers = ":".join(str(ipaddress.IPv4Address(server)) for server in self.name_servers[:2])
        except ValueError as error:
            raise InputError(
                f"the machine's network: {error}",
                hint="addresses are IPv4, the guest's with its prefix length",
            ) from error
        return f"{interface.ip}::{gateway}:{interface.netmask}::{self.device}:off:{servers}".rstrip(":")


def kernel_arguments(
    *,
    reboot: str = "t",
    network: StaticAddress | None = StaticAddress(),  # noqa: B008 - frozen
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
        "console=ttyS0",
        f"reboot={reboot}",
        "panic=-1",
        "quiet",
        "random.trust_cpu=on",
        # Its tests of its own ciphers take 0.3 s without KVM. A kernel in FIPS mode does them anyway.
        "cryptomgr.notests",
        # A tmpfs gets half of the memory at most, which is less than a large Python takes (init/do_mounts.c).
        "rootfstype=ramfs",
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
                f"{word!r} can't be an argument of a kernel: it holds a space, a quote or the like",
                hint="kernel_args are a list: one argument in each entry",
            )
    return " ".join(words)


# --- the report -----------------------------------------------------------------------------------

_PANIC: Final = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")
_UNPACKING: Final = re.compile(r"Initramfs unpacking failed: ([^\r\n]*)")
_REMEDY: Final = "give the machine 256 MiB of memory, and a kernel that knows the initramfs's compression"
_INTERNAL: Final = 70
_TAIL_LINES: Final = 5


@dataclass(frozen=True)
class GuestReport:
    """How a machine ended.

    Args:
        status: `success`; `failed` (vminit ended with an error); the stage that did not work: `settings`,
            `kernel`, `modules`, `network`, `drive`; `internal` for a fault in the initramfs; `panic` when the
            kernel gave up; `none` when the machine said nothing.
        exit: exit status of vminit, None when it did not run or nothing is known.
        message: why, empty after success.
    """

    status: str
    exit: int | None = None
    message: str = ""

    @property
    def exit_code(self) -> int:
        """The exit status of vminit, or 70 where something around it failed."""
        if self.status in ("success", "failed") and self.exit is not None:
            return self.exit
        return _INTERNAL

    @classmethod
    def parse(cls, serial: str) -> Self:
        """Read the last report out of all that came over the serial console."""
        for line in reversed(serial.splitlines()):
            report = cls._parse_line(line)
            if report is not None:
                return report
        panic = _PANIC.search(serial)
        if panic is not None:
            unpacking = _UNPACKING.search(serial)
            why = (
                f" (the initramfs could not be unpacked: {unpacking[1].strip()}; {_REMEDY})"
                if unpacking
                else ""
            )
            return cls("panic", message=f"the machine's kernel gave up: {panic[1].strip()}{why}")
        tail = [line.strip() for line in serial.splitlines() if line.strip()][-_TAIL_LINES:]
        said = f"; its last output: {' / '.join(tail)}" if tail else ""
        return cls("none", message=f"the machine ended without a report{said}")

    @classmethod
    def _parse_line(cls, line: str) -> Self | None:
        _, found, text = line.partition(PREFIX)
        if not found:
            return None
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            return None  # cut off, or mixed with something else
        if not isinstance(members, dict):
            return None
        status, code, message = (members.get(name) for name in ("status", "exit", "message"))
        if not isinstance(status, str) or not isinstance(message, str):
            return None
        known = isinstance(code, int) and not isinstance(code, bool)
        return cls(status, code if known else None, message)
