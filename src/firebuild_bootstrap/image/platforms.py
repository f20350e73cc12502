"""Platforms as Docker writes them, for example `linux/amd64` or `linux/arm/v7`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

from firebuild_bootstrap.errors import InputError
from firebuild_pki.values import dataclass

# What `uname -m` says, where that is not an alias anyway.
_MACHINES: Final = {"armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386"}
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
_ALIASES: Final = {
    "i386": "386",
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "armhf": "arm/v7",
    "armel": "arm/v6",
}
_VARIANTS: Final = {
    "amd64": {"v1": ""},
    "arm64": {"8": "", "v8": "", "v8.0": "", "9": "v9", "9.0": "v9", "v9.0": "v9"},
    "arm": {"": "v7", "5": "v5", "6": "v6", "7": "v7", "8": "v8"},
}
_SYSTEM: Final = re.compile(r"[A-Za-z0-9_-]+(\([A-Za-z0-9_.%-]*(\+[A-Za-z0-9_.%-]+)*\))?")
_PART: Final = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, order=True)
class Platform:
    """What an image is for, normalized as containerd does (github.com/containerd/platforms)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @classmethod
    def of(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Return a platform whose names are spelled as containerd spells them."""
        architecture, _, implied = _ALIASES.get(architecture.lower(), architecture.lower()).partition("/")
        variant = (implied or variant).lower()
        return cls(os.lower(), architecture, _VARIANTS.get(architecture, {}).get(variant, variant))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `OS/ARCHITECTURE[/VARIANT]`.

        Raises:
            InputError: it is malformed.
        """
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise InputError(f"expected a platform such as linux/amd64, found {text!r:.100}")
        return cls.of(*parts)

    @classmethod
    def host(cls, machine: str | None = None) -> Platform:
        """Return the platform of this host; `machine` is what `uname -m` says."""
        machine = machine or os.uname().machine
        return cls.of("linux", _MACHINES.get(machine, machine))

    def runs(self) -> Iterator[Platform]:
        """Yield the platforms whose programs this one executes, the best first, as containerd's `Only`."""
        yield self
        system, architecture, variant = self.os, self.architecture, self.variant
        versions = ("v8", "v7", "v6", "v5")
        match architecture:
            case "amd64":
                level = int(variant[1:]) if re.fullmatch("v[2-9]", variant) else 1
                yield from (
                    Platform(system, "amd64", f"v{n}" if n > 1 else "") for n in range(level - 1, 0, -1)
                )
                yield Platform(system, "386")
            case "arm64":
                if variant:
                    yield Platform(system, "arm64")
                yield from (Platform(system, "arm", version) for version in versions)
            case "arm" if variant in versions:
                yield from (
                    Platform(system, "arm", version) for version in versions[versions.index(variant) + 1 :]
                )


def host_platform(machine: str | None = None) -> str:
    """Return the platform of this host as Docker writes it, for example `linux/amd64`.

    Args:
        machine: the processor as `uname -m` names it, by default this host's.
    """
    return str(Platform.host(machine))


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
        if _ALIASES.get(system, system).partition("/")[0] not in _ARCHITECTURES:
            raise ValueError("there is no such operating system or architecture")
        system, rest = "linux", [system]
    return str(Platform.of(system, *rest))
