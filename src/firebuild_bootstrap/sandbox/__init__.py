"""Running programs in bubblewrap sandboxes in which the owners of files come out right."""

from __future__ import annotations

from firebuild_bootstrap.sandbox.bwrap import (
    Sandbox,
    SandboxError,
    detect,
    expected,
    find_bwrap,
    probe,
)
from firebuild_bootstrap.sandbox.idmap import Host, IdMap, IdMode, IdRange
from firebuild_bootstrap.sandbox.process import SandboxProcess
from firebuild_bootstrap.sandbox.runtime import Bind, Link, Runtime, find_runtime

__all__ = [
    "Bind",
    "Host",
    "IdMap",
    "IdMode",
    "IdRange",
    "Link",
    "Runtime",
    "Sandbox",
    "SandboxError",
    "SandboxProcess",
    "detect",
    "expected",
    "find_bwrap",
    "find_runtime",
    "probe",
]
