"""Removes a build's directory after the build is gone, however it went.

Runs as `python -m firebuild_bootstrap.machine.janitor DIRECTORY ID-MAP`. Standard input is a pipe
whose writing ends are held by firebuild and by each of its sandboxes: its end means that all are gone.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from firebuild_bootstrap.sandbox import Bind, IdMap, Sandbox, find_runtime


def remove(directory: Path, idmap: IdMap) -> None:
    """Remove `directory`: what this user may at once, and the rest in the id mapping that made it."""
    if os.geteuid() != 0:
        command = ["rm", "-rf", "--one-file-system", "--", f"/builds/{directory.name}"]
        binds = [*find_runtime().binds, Bind(directory.parent, "/builds", read_only=False)]
        Sandbox(idmap).run(command, binds=binds)
    shutil.rmtree(directory, ignore_errors=True)


def main(lifeline: int = 0) -> None:
    """Wait for the end of the pipe `lifeline` and remove the directory."""
    directory, idmap = Path(sys.argv[1]), IdMap.from_json(json.loads(sys.argv[2]))
    while os.read(lifeline, 4096):
        pass
    remove(directory, idmap)


if __name__ == "__main__":
    main()
