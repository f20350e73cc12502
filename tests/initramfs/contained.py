"""The initramfs's init as the first process of a container: all of a machine but its kernel, in a second."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from initramfs.hosting import Happened, Scenario, run

# The console is the program's own output. What a drive would hold is an empty tmpfs.
_PREPARE = """
set -e
mount --bind "$1" "$1"
cd "$1"
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom tty; do touch dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd/1 dev/console
mount -t proc proc proc
mount --rbind /sys sys
printf '%s' "$2" > dev/cmdline
mount --bind dev/cmdline proc/cmdline
exec chroot . /init
"""
DRIVE = "firebuild.root=/dev/zero firebuild.rootfstype=tmpfs"
HERE = "firebuild.mmds=http://127.0.0.1 firebuild.mmds_timeout=5 ip=off"


def machine(tree: Path, command_line: str) -> list[str]:
    """The command that runs the init of the unpacked initramfs `tree`."""
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return [*unshare, "sh", "-c", _PREPARE, "sh", str(tree), command_line]


def contain(
    tree: Path, context: Path, command_line: str = f"{DRIVE} {HERE}", **fields: str | float
) -> Happened:
    """Run a build in a container whose first process is the initramfs's init."""
    scenario = Scenario(machine(tree, command_line), str(context), address="127.0.0.1", **fields)  # type: ignore[arg-type]
    return run(scenario)


def changed(tree: Path, target: Path, **modules: str) -> Path:
    """Copy the initramfs and replace modules of vminit by the given source code."""
    shutil.copytree(tree, target, symlinks=True, copy_function=_link)
    for name, source in modules.items():
        guest(target).joinpath(f"{name}.py").write_text(source)
    return target


def guest(tree: Path) -> Path:
    """Where vminit is in an initramfs."""
    [found] = tree.glob(f"vminit/{sys.platlibdir}/*/firebuild_bootstrap/guest")
    return found


def _link(source: str, target: str) -> None:
    os.link(source, target, follow_symlinks=False)
