"""Checks before a Firecracker is started, each with an error of its own."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_pki.display import counted
from firebuild_pki.homes import absolute, open_file

# The V2 of the metadata service and today's form of the API came with it.
OLDEST: Final = (1, 0)
_MAJOR: Final = 1
# unix(7): 108 bytes, of which the last is a zero.
_SOCKET_BYTES: Final = 107
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.\d+")
_SECONDS: Final = 10.0
_BUILT: Final = "is it built for this host's processor?"


def find_program(name: str, setting: str) -> Path:
    """Return the program's real path.

    Args:
        name: a path, or a name to look for on PATH.
        setting: what names it in the configuration.

    Raises:
        InputError: there is none, or it is not executable.
    """
    name = os.path.expanduser(name)
    found = shutil.which(name)
    if found is not None:
        return Path(found).resolve()
    path = Path(name)
    if "/" in name and path.exists():
        raise InputError(f"{setting}: {name} is not executable", hint=f"chmod +x {name}")
    raise InputError(
        f"{setting}: the program {name} was not found",
        hint="install it (github.com/firecracker-microvm/firecracker has releases), or set its path",
    )


def program_version(program: Path) -> tuple[int, int]:
    """Ask a Firecracker or jailer for its version, and make sure that it is one that we know.

    Raises:
        InputError: it is too old, too new, or answers something else.
        MachineError: it can't be run.
    """
    try:
        done = run_program([program, "--version"], seconds=_SECONDS, install=_BUILT)
    except LimitExceeded as error:
        raise MachineError(f"{program} --version failed: {error}", hint=_BUILT) from error
    return check_version(done.stdout.decode("utf-8", "replace"), str(program))


def check_version(text: str, where: str) -> tuple[int, int]:
    """Read a version out of `text`; as `program_version`."""
    found = _VERSION.search(text.partition("\n")[0])
    wanted = f"expected Firecracker {OLDEST[0]}.{OLDEST[1]} or a later {_MAJOR}.x"
    if found is None:
        raise InputError(
            f"{where}: {wanted}, and its version is unknown: it says {text.strip()[:80]!r}",
            hint="name the program firecracker itself, not one that wraps it",
        )
    version = int(found[1]), int(found[2])
    if version < OLDEST:
        raise InputError(f"{where}: {wanted}, found {found[0]}, which is too old", hint="install a newer one")
    if version[0] > _MAJOR:
        raise InputError(
            f"{where}: {wanted}, found {found[0]}", hint="install a newer firebuild, or an older one"
        )
    return version


def check_kernel(
    name: str | None, machine: str | None = None, *, setting: str = "machine.firecracker.kernel"
) -> Path:
    """Return the kernel's path, once it looks like one that Firecracker boots.

    Args:
        name: the value of the setting.
        machine: the architecture; this host's when None.
        setting: what says which kernel, for errors: a setting, or an option.

    Raises:
        InputError: none is set, it can't be read, or has another form.
    """
    if name is None:
        raise InputError(
            f"{setting} is not set: expected the path of the kernel to boot",
            hint="Firecracker's getting-started guide says where to get or how to build one",
        )
    path = absolute(name)
    try:
        with open_file(path) as file:
            head = file.read(1024)
    except OSError as error:
        raise InputError(
            f"{setting}: {path} can't be read: {error.strerror}", hint="name a kernel that this user may read"
        ) from error
    if (machine or os.uname().machine) == "aarch64":
        if head[0x38:0x3C] != b"ARM\x64":
            raise InputError(
                f"{setting}: {path} is not a kernel for aarch64 (Image, uncompressed)",
                hint="the build of a kernel leaves it in arch/arm64/boot/Image",
            )
    elif head[:4] != b"\x7fELF":
        packed = head[0x202:0x206] == b"HdrS"
        raise InputError(
            f"{setting}: expected an uncompressed kernel (vmlinux, ELF), and {path} is "
            + ("a compressed one (bzImage)" if packed else "something else"),
            hint="the source of Linux has scripts/extract-vmlinux, which unpacks a compressed one"
            if packed
            else None,
        )
    return path


def check_socket_path(path: Path, setting: str) -> None:
    """Refuse a path that no program could bind or connect to (unix(7)).

    Raises:
        InputError: it is too long.
    """
    length = len(os.fsencode(path))
    if length > _SOCKET_BYTES:
        raise InputError(
            f"the API socket would be {path}: that takes {counted(length, 'byte')}, and a socket's path "
            f"can have {_SOCKET_BYTES}",
            hint=f"make {setting} shorter",
        )
