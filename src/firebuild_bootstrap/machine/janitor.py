"""Removes a build's directory after the build is gone, however it went.

Runs as `python -m firebuild_bootstrap.machine.janitor DIRECTORY ID-MAP FIREBUILD-PID`. Standard input is
a pipe whose writing ends are held by firebuild and by each of its sandboxes: its end means that all are
gone. Sandboxes die with firebuild; one that has not a few seconds after it is ended from here.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from pathlib import Path
from typing import Final

from firebuild_bootstrap.machine import leftovers
from firebuild_bootstrap.sandbox import Bind, IdMap, Sandbox, end_holders, find_runtime

# What firebuild writes into the pipe when it is done with its sandboxes.
LEAVING: Final = b"leaving"
_GRACE_SECONDS: Final = 2.0
_CHECK_SECONDS: Final = 0.5


def remove(directory: Path, idmap: IdMap) -> None:
    """Remove `directory` and what is on its list of leftovers.

    What this user may remove is removed at once, and the rest in the id mapping that made it.
    """
    leftovers.clear(directory)
    if os.geteuid() != 0:
        command = ["rm", "-rf", "--one-file-system", "--", f"/builds/{directory.name}"]
        binds = [*find_runtime().binds, Bind(directory.parent, "/builds", read_only=False)]
        Sandbox(idmap).run(command, binds=binds)
    shutil.rmtree(directory, ignore_errors=True)


def await_end(lifeline: int, parent: int) -> None:
    """Wait until nobody holds the pipe `lifeline` any more.

    Args:
        parent: process id of firebuild. Once it is gone or has said that it leaves, the others that hold
            the pipe have a grace of a few seconds before they are ended.
    """
    left: float | None = None
    while True:
        readable, _, _ = select.select([lifeline], [], [], _CHECK_SECONDS)
        if readable and not os.read(lifeline, 4096):
            return
        if left is None and (readable or os.getppid() != parent):
            left = time.monotonic()
        if left is not None and time.monotonic() - left > _GRACE_SECONDS:
            end_holders(lifeline)


def main(lifeline: int = 0) -> None:
    """Wait for the end of the pipe `lifeline` and remove the directory."""
    directory, idmap, parent = Path(sys.argv[1]), IdMap.from_json(json.loads(sys.argv[2])), int(sys.argv[3])
    await_end(lifeline, parent)
    remove(directory, idmap)


if __name__ == "__main__":
    main()
