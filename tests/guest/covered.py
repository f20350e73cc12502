"""Runs vminit and its helpers under coverage, in sandboxes where coverage can't look after itself.

They end by execve or _exit, change their root and their user: so the data are kept in memory and written
right before, through a descriptor of the directory that stays valid all the way.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
from typing import Any

DATA = "/coverage"


def measure() -> int:
    """Begin, and return the descriptor of the directory for the data."""
    coverage = importlib.import_module("coverage")
    importlib.import_module("sqlite3.dump")  # out of reach when it is needed
    directory = os.open(DATA, os.O_RDONLY | os.O_DIRECTORY)
    packages = ["firebuild_bootstrap.guest"]
    measuring = coverage.Coverage(
        data_file=None, branch=True, source_pkgs=packages, config_file=False, messages=False
    )
    measuring.start()

    def save() -> None:
        data = measuring.get_data().dumps()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        part = os.open(f"part.{os.urandom(8).hex()}", flags, 0o666, dir_fd=directory)
        os.write(part, data)
        os.close(part)

    def saving(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            save()
            return function(*arguments)

        return call

    for name in ("_exit", "execve"):
        setattr(os, name, saving(getattr(os, name)))
    atexit.register(save)
    return directory


def vminit() -> int:
    directory = measure()
    from firebuild_bootstrap.guest import enter, main

    close_others = enter.close_others
    enter.close_others = lambda *needed: close_others(*needed, directory)
    return main.main(alone=True)


if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(__file__)))
    sys.exit(vminit())
