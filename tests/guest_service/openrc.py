"""OpenRC in a small machine: Debian's, as `tests/initramfs/fetch openrc` unpacks it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from firebuild_bootstrap.initramfs.cpio import Entry, directory, file, link
from guest_service.system import Manager, unit, which
from support import OPENRC

_END = b"""#!/sbin/openrc-run
depend() { after ssh vminit-entrypoint; }
start() { sh /end; }
"""
# Has a name and a header as Debian's has, and says what there was when it started.
_SSH = b"""#!/bin/sh
### BEGIN INIT INFO
# Provides: sshd
# Required-Start: $remote_fs $syslog
# Required-Stop:
# Default-Start: 2 3 4 5
# Default-Stop:
### END INIT INFO
cat /etc/hostname > /run/sshd-saw
"""


def openrc() -> Manager:
    return Manager(
        init="/sbin/openrc-init",
        # Debian's OpenRC has none of its own.
        programs={"sbin/start-stop-daemon": which("start-stop-daemon"), **_programs()},
        files=_files(),
        flags="etc/conf.d/vminit",
        applets=("cp", "grep", "kill", "md5sum", "mkdir", "mount", "pidof", "rm", "sed", "tr", "uname"),
        libraries=f"{OPENRC}/lib/{os.uname().machine}-linux-gnu",
    )


def _unpacked() -> Iterator[Path]:
    for name in ("bin", "sbin", "etc", "lib/rc"):
        yield from (OPENRC / name).rglob("*")


def _programs() -> dict[str, Path]:
    found = (path for path in _unpacked() if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(OPENRC)): path for path in found if os.access(path, os.X_OK)}


def _files() -> Iterator[Entry]:
    for path in _unpacked():
        name = str(path.relative_to(OPENRC))
        if path.is_symlink():
            yield link(name, os.readlink(path))
        elif path.is_dir():
            yield directory(name)
        elif not os.access(path, os.X_OK):
            yield file(name, path.read_bytes())
    yield directory("var/log")
    services = {"end": _END, "ssh": _SSH}
    for name in ("vminit", "vminit-entrypoint"):
        services[name] = unit(f"{name}.initd")
    for name, text in services.items():
        yield file(f"etc/init.d/{name}", text, 0o755)
        yield link(f"etc/runlevels/default/{name}", f"/etc/init.d/{name}")
