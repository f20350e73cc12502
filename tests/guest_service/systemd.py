"""systemd in a small machine, from this host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from firebuild_bootstrap.initramfs.cpio import Entry, file, link
from guest_service.system import Manager, unit

_TARGETS = ("basic", "local-fs", "multi-user", "network", "network-online", "shutdown", "sysinit", "umount")
# Since version 255 the second executes what services consist of.
_PROGRAMS = (Path("/usr/lib/systemd/systemd"), Path("/usr/lib/systemd/systemd-executor"))
_END = b"""[Unit]
After=vminit-entrypoint.service
[Service]
Type=oneshot
ExecStart=/bin/sh /end
"""
_CONSOLE = b"[Service]\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\n"


def systemd() -> Manager:
    return Manager(
        init="/lib/systemd/systemd",
        programs={f"lib/systemd/{path.name}": path for path in _PROGRAMS if path.exists()},
        files=_files(),
        flags="etc/default/vminit",
        words=("systemd.show_status=0", "systemd.log_target=console", "systemd.log_level=warning"),
    )


def _files() -> Iterator[Entry]:
    yield file("etc/machine-id", b"0123456789abcdef0123456789abcdef\n")
    for name in _TARGETS:
        path = Path(f"/usr/lib/systemd/system/{name}.target")
        yield file(f"lib/systemd/system/{path.name}", path.read_bytes())
    yield link("lib/systemd/system/default.target", "multi-user.target")
    units = {"end.service": _END}
    for name in ("vminit.service", "vminit-entrypoint.service"):
        units[name] = unit(name)
        # There is no journal here.
        yield file(f"etc/systemd/system/{name}.d/console.conf", _CONSOLE)
    for name, text in units.items():
        yield file(f"etc/systemd/system/{name}", text)
        yield link(f"etc/systemd/system/multi-user.target.wants/{name}", f"../{name}")
