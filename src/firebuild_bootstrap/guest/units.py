"""vminit as a service of an image: the files for systemd and OpenRC, and the flags that they read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

from .errors import InputError

UNITS = ("vminit.service", "vminit-entrypoint.service", "vminit.initd", "vminit-entrypoint.initd")
_PROGRAM = "/usr/bin/vminit"
_RUNNER = "/usr/bin/firebuild-entrypoint"
# What means the same to systemd, which has its own quotes and specifiers, and to a shell.
_PLAIN = re.compile(r"[A-Za-z0-9_@+:,./\[\]-]+")


def print_flags(flags: Mapping[str, str]) -> str:
    """Return the line for `/etc/default/vminit` (systemd) or `/etc/conf.d/vminit` (OpenRC).

    Args:
        flags: their values by their names.

    Raises:
        InputError: a value can't be in such a file.
    """
    words = " ".join(f"{name}={_plain(value)}" for name, value in flags.items())
    return f'VMINIT_FLAGS="{words}"\n'


def print_unit(name: str, runner: str, *, program: str | None = None) -> str:
    """Return the service file `name`, one of `UNITS`.

    Args:
        runner: the script that starts the entrypoint, which vminit writes.
        program: where vminit is in the image; by default where this one is.

    Raises:
        InputError: a path can't be in such a file.
    """
    import pkgutil  # not needed to start a machine

    text = (pkgutil.get_data(__package__, f"service/{name}") or b"").decode()
    return text.replace(_RUNNER, _plain(runner)).replace(_PROGRAM, _plain(program or _own_path()))


def _own_path() -> str:
    path = os.path.abspath(sys.argv[0])
    return path if os.path.basename(path) == os.path.basename(_PROGRAM) else _PROGRAM


def _plain(value: str) -> str:
    if not _PLAIN.fullmatch(value):
        raise InputError(f"{value!r:.80} can't be in a service file: expected letters, digits and @+:,./_-")
    return value
