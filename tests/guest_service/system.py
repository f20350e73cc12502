"""A small Linux with systemd and vminit as its service, made of this host's own programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from firebuild_bootstrap.agent.cpio import Entry, directory, file, link
from firebuild_bootstrap.agent.libraries import LibraryFinder
from firebuild_bootstrap.guest.units import print_unit

SYSTEMD = Path("/usr/lib/systemd/systemd")
_TARGETS = ("basic", "local-fs", "multi-user", "network", "network-online", "shutdown", "sysinit", "umount")
_APPLETS = ("cat", "chown", "echo", "hostname", "id", "ls", "mv", "reboot", "sleep", "stat")
_PYTHON = "#!/agent/bin/python3 -IBSXutf8\n"
_INIT = f"""{_PYTHON}
import os
from firebuild_bootstrap.guest import init_network, init_settings, init_system

init_system.mount_file_systems()
init_system.load_modules()
with open("/proc/cmdline") as file:
    settings = init_settings.parse_command_line(file.read())
init_network.bring_up(settings.network, "169.254.169.254")
os.chown("/home/app", 1000, 1001)
os.execv("/lib/systemd/systemd", ["systemd"])
"""
_VMINIT = f"{_PYTHON}from firebuild_bootstrap.guest.main import main\nraise SystemExit(main())\n"
_END = """[Unit]
After=vminit-entrypoint.service
[Service]
Type=oneshot
ExecStart=/bin/sh /end
"""


_CONSOLE = b"[Service]\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/console\n"


def system(report: str) -> Iterator[Entry]:
    """Yield what a machine has besides the files of an agent.

    Args:
        report: a shell script that runs last and ends the machine.
    """
    finder = LibraryFinder(os.uname().machine, os.environ)
    # Busybox has a shell, too, which prefers its own setpriv.
    programs = {"bin/setpriv": _which("setpriv"), "bin/sh": _which("sh"), "lib/systemd/systemd": SYSTEMD}
    libraries: dict[str, Path] = {}
    for name, program in programs.items():
        yield file(name, program.read_bytes(), 0o755)
        libraries.update(finder.closure(program, ()).files)
    for name, path in libraries.items():
        yield file(f"lib/{name}", path.read_bytes(), 0o755)
    yield file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    yield from (link(f"bin/{name}", "busybox") for name in _APPLETS)
    yield file("init", _INIT.encode(), 0o755)
    yield file("end", report.encode())
    yield from _etc()
    yield from _units()


def _which(name: str) -> Path:
    found = shutil.which(name)
    assert found is not None
    return Path(found).resolve()


def _etc() -> Iterator[Entry]:
    yield file("etc/machine-id", b"0123456789abcdef0123456789abcdef\n")
    yield file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
    yield file("etc/group", b"root:x:0:\napp:x:1001:\n")
    yield file("etc/hostname", b"unnamed\n")
    yield directory("home/app")


def _units() -> Iterator[Entry]:
    for name in _TARGETS:
        path = Path(f"/usr/lib/systemd/system/{name}.target")
        yield file(f"lib/systemd/system/{path.name}", path.read_bytes())
    yield link("lib/systemd/system/default.target", "multi-user.target")
    yield file("bin/vminit", _VMINIT.encode(), 0o755)
    yield file(
        "etc/default/vminit", b'VMINIT_FLAGS="--mmds-timeout=20 --environment-file=/etc/profile.d/own.sh"\n'
    )
    units = {"end.service": _END}
    for name in ("vminit", "vminit-entrypoint"):
        # There is no journal here.
        yield file(f"etc/systemd/system/{name}.service.d/console.conf", _CONSOLE)
    for name in ("vminit.service", "vminit-entrypoint.service"):
        units[name] = print_unit(name, "/usr/bin/firebuild-entrypoint", program="/usr/bin/vminit")
    for name, text in units.items():
        yield file(f"etc/systemd/system/{name}", text.encode())
        yield link(f"etc/systemd/system/multi-user.target.wants/{name}", f"../{name}")
