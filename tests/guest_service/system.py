"""A small Linux with vminit as its service, made of this host's own programs."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from firebuild_bootstrap.guest.units import print_unit
from firebuild_bootstrap.initramfs.cpio import Entry, directory, file, link
from firebuild_bootstrap.initramfs.libraries import LibraryFinder

_APPLETS = ("cat", "chown", "echo", "hostname", "id", "ls", "mv", "reboot", "sleep", "stat")
_PYTHON = "#!/vminit/bin/python3 -IBSXutf8\n"
_INIT = f"""{_PYTHON}
import os
from firebuild_bootstrap.guest import init_network, init_settings, init_system

init_system.mount_file_systems()
init_system.load_modules()
with open("/proc/cmdline") as file:
    settings = init_settings.parse_command_line(file.read())
init_network.bring_up(settings.network, "169.254.169.254")
os.chown("/home/app", 1000, 1001)
os.execv("/manager", ["manager"])
"""
_VMINIT = f"{_PYTHON}from firebuild_bootstrap.guest.main import main\nraise SystemExit(main())\n"


@dataclass(frozen=True)
class Manager:
    """What starts the services of a machine.

    Args:
        init: becomes process 1.
        programs: from this host, by their paths in the machine.
        applets: of busybox, besides those that every machine has.
        libraries: a directory that has some which the host lacks.
        flags: the file with those of vminit.
        files: everything else; the service that runs `/end` last is one.
        words: for the kernel's command line.
    """

    init: str
    programs: Mapping[str, Path]
    files: Iterable[Entry]
    flags: str
    applets: tuple[str, ...] = ()
    libraries: str = ""
    words: tuple[str, ...] = ()


def system(manager: Manager, flags: str, report: str) -> Iterator[Entry]:
    """Yield what a machine has besides the files of an initramfs.

    Args:
        flags: of vminit, as a line of a shell.
        report: a shell script that runs last and ends the machine.
    """
    # Busybox has a shell, too, which prefers its own setpriv.
    programs = {"bin/setpriv": which("setpriv"), "bin/sh": which("sh"), **manager.programs}
    yield from (file(name, program.read_bytes(), 0o755) for name, program in programs.items())
    yield from _libraries(programs.values(), manager.libraries)
    yield file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    yield from (link(f"bin/{name}", "busybox") for name in (*_APPLETS, *manager.applets))
    yield link("manager", manager.init)
    yield file("init", _INIT.encode(), 0o755)
    yield file("bin/vminit", _VMINIT.encode(), 0o755)
    yield file("end", report.encode())
    yield file(manager.flags, flags.encode())
    yield from _etc()
    yield from manager.files


def which(name: str) -> Path:
    found = shutil.which(name)
    assert found is not None
    return Path(found).resolve()


def unit(name: str) -> bytes:
    """Return a service file for a vminit in its usual place."""
    return print_unit(name, "/usr/bin/firebuild-entrypoint", program="/usr/bin/vminit").encode()


def _libraries(programs: Iterable[Path], more: str) -> Iterator[Entry]:
    finder = LibraryFinder(os.uname().machine, {"LD_LIBRARY_PATH": more})
    found: dict[str, Path] = {}
    for program in programs:
        if program.read_bytes().startswith(b"\x7fELF"):
            opened = _opened_later(program)
            found |= {path.name: path for path in opened}
            found.update(finder.closure(program, opened).files)
    for name, path in found.items():
        yield file(f"lib/{name}", path.read_bytes(), 0o755)


def _opened_later(program: Path) -> list[Path]:
    """Find the libraries that a program opens by itself and can't do without, as systemd since 259.

    Its notes have them (https://uapi-group.org/specifications/specs/elf_dlopen_metadata/).
    """
    found = []
    for note in re.findall(rb'\[\{"feature":[^\n\0]+?\}\]', program.read_bytes()):
        for each in json.loads(note):
            if each.get("priority") == "required":
                names = [path for name in each["soname"] for path in Path("/usr/lib").glob(f"*/{name}")]
                found += names[:1]
    return found


def _etc() -> Iterator[Entry]:
    yield file("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n")
    yield file("etc/group", b"root:x:0:\napp:x:1001:\n")
    yield file("etc/hostname", b"unnamed\n")
    yield directory("home/app")
