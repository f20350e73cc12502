"""Platforms as Docker writes them, for example `linux/amd64` or `linux/arm/v7`."""

from __future__ import annotations

import os
import re
from typing import Final

_MACHINES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
    "i686": "386",
}
# https://github.com/containerd/platforms, whose Parse is what BuildKit asks.
_SYSTEMS: Final = frozenset(
    (
        *("aix", "android", "darwin", "dragonfly", "freebsd", "hurd", "illumos", "ios", "js", "linux"),
        *("macos", "nacl", "netbsd", "openbsd", "plan9", "solaris", "windows", "zos"),
    )
)
_ARCHITECTURES: Final = frozenset(
    (
        *("386", "amd64", "amd64p32", "arm", "armbe", "arm64", "arm64be", "loong64", "mips", "mipsle"),
        *("mips64", "mips64le", "mips64p32", "mips64p32le", "ppc", "ppc64", "ppc64le", "riscv", "riscv64"),
        *("s390", "s390x", "sparc", "sparc64", "wasm"),
    )
)
_ARCHITECTURE_ALIASES: Final = {
    "i386": "386",
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm/v7",
    "armel": "arm/v6",
}
_VARIANT_ALIASES: Final = {
    "amd64": {"v1": ""},
    "arm64": {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"},
    "arm": {"": "v7", "5": "v5", "6": "v6", "7": "v7", "8": "v8"},
}
_SYSTEM: Final = re.compile(r"[A-Za-z0-9_-]+(\([A-Za-z0-9_.%-]*(\+[A-Za-z0-9_.%-]+)*\))?")
_PART: Final = re.compile(r"[A-Za-z0-9_.-]+")


def host_platform(machine: str | None = None) -> str:
    """Return the platform of this host as Docker writes it, for example `linux/amd64`.

    Args:
        machine: the processor as `uname -m` names it, by default this host's.
    """
    machine = machine or os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def normal_platform(text: str, host: str) -> str:
    """Return a platform as `host_platform` writes it; a missing half is the host's.

    Args:
        text: `system/architecture`, `system/architecture/variant`, or a known system or architecture alone.
        host: the host's platform.

    Raises:
        ValueError: it is not a platform; the message says why.
    """
    system, *rest = text.split("/")
    if not _SYSTEM.fullmatch(system) or not all(map(_PART.fullmatch, rest)) or len(rest) > 2:
        raise ValueError("expected system/architecture or system/architecture/variant")
    system, rest = system.lower(), [part.lower() for part in rest]
    if not rest:
        if system in _SYSTEMS:
            return f"{system}/{host.partition('/')[2]}"
        if _ARCHITECTURE_ALIASES.get(system, system).partition("/")[0] not in _ARCHITECTURES:
            raise ValueError("there is no such operating system or architecture")
        system, rest = "linux", [system]
    architecture, _, variant = _ARCHITECTURE_ALIASES.get(rest[0], rest[0]).partition("/")
    variant = variant or "".join(rest[1:])
    variant = _VARIANT_ALIASES.get(architecture, {}).get(variant, variant)
    return "/".join(filter(None, (system, architecture, variant)))
