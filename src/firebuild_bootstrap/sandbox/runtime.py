"""What of the host a sandbox sees, read-only: enough to run this Python and the host's programs.

Neither a home directory as a whole nor any configuration of the user is ever part of it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Final

import firebuild_bootstrap
from firebuild_pki.values import dataclass

_SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/gnu/store")
_SETTINGS: Final = ("ld.so.cache", "resolv.conf", "hosts", "nsswitch.conf", "alternatives")
# What vminit and the workers import; looked for where a whole directory must not be shown.
_PACKAGES: Final = ("firebuild_bootstrap", "firebuild_pki", "grpc", "google", "typing_extensions.py")


@dataclass(frozen=True)
class Bind:
    """A file or directory of the host that the sandbox sees at `dest` (the same path when empty)."""

    source: Path
    dest: str = ""
    read_only: bool = True

    @property
    def target(self) -> str:
        """Where the sandbox sees it."""
        return self.dest or str(self.source)


@dataclass(frozen=True)
class Link:
    """A symbolic link `dest` inside the sandbox that says `text`."""

    text: str
    dest: str


@dataclass(frozen=True)
class Runtime:
    """How to run Python in a sandbox: what to bind, which command, which environment."""

    binds: tuple[Bind | Link, ...]
    python: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    def module(self, name: str, *arguments: str) -> list[str]:
        """Return the command that runs the module `name`."""
        return [*self.python, "-m", name, *arguments]


def find_runtime(
    *,
    search_path: Sequence[str] | None = None,
    home: Path | None = None,
) -> Runtime:
    """Describe the runtime of this process; the arguments replace what this process would tell.

    Works for system Pythons, virtual environments, pyenv, conda and editable installs: the base
    interpreter runs without `site`, and finds the same packages through PYTHONPATH.
    """
    homes = {home or Path(os.path.expanduser("~")), Path(os.path.expanduser("~root"))}
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    package_root = str(Path(firebuild_bootstrap.__file__).resolve().parent.parent)
    entries = [*_useful(sys.path if search_path is None else search_path), package_root]
    binds: dict[str, Bind | Link] = {}
    for path in (*_SYSTEM, *_interpreter(base)):
        _show(binds, Path(path))
    for name in _SETTINGS:
        if Path("/etc", name).exists():
            binds[f"/etc/{name}"] = Bind(Path("/etc", name))
    for entry in dict.fromkeys(entries):
        _show_packages(binds, Path(entry), homes)
    env = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(entries)), "PYTHONDONTWRITEBYTECODE": "1"}
    if "LD_LIBRARY_PATH" in os.environ:  # some Pythons find their own library only through it
        env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return Runtime(tuple(binds[key] for key in sorted(binds)), (base, "-sSP"), env)


def _useful(search_path: Iterable[str]) -> list[str]:
    """Keep what holds a needed package: the directory of a script or the current one usually does not."""
    found = [os.path.realpath(entry) for entry in search_path if entry]
    return [path for path in found if any(os.path.exists(f"{path}/{name}") for name in _PACKAGES)]


def _interpreter(base: str) -> list[str]:
    prefix = os.path.realpath(sys.base_prefix)
    return [base, f"{prefix}/lib", f"{prefix}/lib64", os.path.realpath(sysconfig.get_path("stdlib"))]


def _show(binds: dict[str, Bind | Link], path: Path) -> None:
    if path.is_symlink() and path.parent == Path("/"):
        binds[str(path)] = Link(os.readlink(path), str(path))
    elif path.exists() and not any(str(parent) in binds for parent in path.parents):
        binds[str(path)] = Bind(path)


def _show_packages(binds: dict[str, Bind | Link], entry: Path, homes: set[Path]) -> None:
    if not any(home.is_relative_to(entry) for home in homes):
        _show(binds, entry)
        return
    for name in _PACKAGES:
        _show(binds, entry / name)
