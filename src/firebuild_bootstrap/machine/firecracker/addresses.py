"""The interfaces and addresses of this host, as the program `ip` (iproute2) tells and sets them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any, Final

from firebuild_bootstrap.errors import MachineError

_SEARCH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_NET: Final = Path("/sys/class/net")
_IFF_TAP: Final = 0x2  # linux/if_tun.h


@dataclass(frozen=True)
class Interface:
    """An interface of this host: its name, its IPv4 addresses, whether it is up, the bridge it belongs to."""

    name: str
    addresses: tuple[IPv4Interface, ...]
    up: bool
    bridge: str = ""


def ip(*arguments: str) -> str:
    """Run `ip` and return what it wrote.

    Raises:
        MachineError: it failed, or is not installed.
    """
    program = shutil.which("ip", path=_SEARCH)
    if program is None:
        raise MachineError("the program ip was not found", hint="install the package iproute2")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip() or f"status {done.returncode}"
        raise MachineError(f"ip {' '.join(arguments)} failed: {words}")
    return done.stdout


def interfaces() -> list[Interface]:
    """Return all interfaces of this host.

    Raises:
        MachineError: `ip` failed, or is not installed.
    """
    entries: list[dict[str, Any]] = json.loads(ip("-json", "address") or "[]")
    return [_interface(entry) for entry in entries if entry]


def _interface(entry: dict[str, Any]) -> Interface:
    found = [one for one in entry.get("addr_info", ()) if one.get("family") == "inet"]
    addresses = tuple(IPv4Interface(f"{one['local']}/{one['prefixlen']}") for one in found)
    return Interface(entry["ifname"], addresses, "UP" in entry["flags"], entry.get("master", ""))


def find(name: str, among: Sequence[Interface]) -> Interface | None:
    """Return the interface `name`, or None."""
    return next((one for one in among if one.name == name), None)


def tap_owner(name: str) -> int | None:
    """Return whose the tap device `name` is, -1 when no user's; None when it is no tap device."""
    try:
        flags = int((_NET / name / "tun_flags").read_text("ascii"), 16)
        owner = int((_NET / name / "owner").read_text("ascii"))
    except OSError:
        return None
    return owner if flags & _IFF_TAP else None
