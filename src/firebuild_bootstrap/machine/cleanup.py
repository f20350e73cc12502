"""Removes a build's directory after the build is gone, however it went.

Runs as `python -m firebuild_bootstrap.machine.cleanup DIRECTORY ID-MAP FIREBUILD-PID`. Standard input is
a pipe whose writing ends are held by firebuild and by each of its sandboxes: its end means that all are
gone. Sandboxes die with firebuild; one that has not a few seconds after it is ended from here. The directory
is moved out of the way first; the end of standard output tells firebuild, which does not wait for the rest.

With the store as its only argument it removes what builds left behind whose cleanup died too.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import secrets
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import FirebuildError, MachineError
from firebuild_bootstrap.machine import leftovers
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sandbox import Bind, IdMap, Sandbox, detect, end_holders, find_runtime

# What firebuild writes into the pipe when it is done with its sandboxes.
LEAVING: Final = b"leaving"
_GRACE_SECONDS: Final = 2.0
_CHECK_SECONDS: Final = 0.5


def retire(directory: Path) -> Path:
    """Clear the leftovers of `<store>/builds/ID`, move it to `<store>/removing`, and return where it is now.

    It stays where it is if it can't be moved, for example because `builds` is a file system of its own.
    """
    leftovers.clear(directory)
    # Only the machines' own directories: what is deeper may be a guest's, and the lists hold commands.
    for part in directory.glob(f"{glob.escape(directory.name)}-*"):
        leftovers.clear(part)
    store = directory.parent.parent
    # An id may be used again while the directory of its last build is still being removed.
    retired = store / "removing" / f"{directory.name}.{secrets.token_hex(4)}"
    try:
        retired.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(directory, retired)
    except OSError:
        return directory
    return retired


def remove(directory: Path, idmap: IdMap) -> None:
    """Remove `directory`: what only its id mapping may remove from in there, and the rest from here."""
    if os.geteuid() != 0:
        runtime = find_runtime()
        binds = [*runtime.binds, Bind(directory.parent, "/builds", read_only=False)]
        command = runtime.module("firebuild_bootstrap.removal", f"/builds/{directory.name}")
        with suppress(MachineError):
            Sandbox(idmap).run(command, binds=binds, env=runtime.env)
    remove_tree(directory, ignore_errors=True)


def own(directory: Path) -> int:
    """Return a descriptor that holds the lock of a build's directory.

    Raises:
        OSError: it can't be opened, or its build or cleanup lives (BlockingIOError).
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def abandoned(folder: Path) -> Iterator[Path]:
    """Yield the directories in `folder` without a holder, each locked for as long as it is looked at."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # there is none, or it is another user's
        return
    for entry in entries:
        with suppress(OSError, MachineError):  # a file, a running build, or another user's
            lock = own(entry)
            try:
                yield entry
            finally:
                os.close(lock)


@contextmanager
def builds_locked(builds: Path) -> Iterator[None]:
    """Keep everybody else from making or retiring a directory in `builds`, which exists."""
    descriptor = os.open(builds / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(store: Path) -> None:
    """Remove what dead builds left in `store`."""
    builds = store / "builds"
    if builds.is_dir():
        with builds_locked(builds):
            for entry in abandoned(builds):
                retire(entry)
    idmap = detect()
    for folder in (store / "removing", builds):
        for entry in abandoned(folder):
            remove(entry, idmap)
    settle(store, idmap)


def settle(store: Path, idmap: IdMap) -> None:
    """Remove the half-made layers of dead builds from `store`, and see to it that finished ones last."""
    from firebuild_bootstrap.image.layertrees import LayerTrees  # the cleanup process has to be ready soon
    from firebuild_bootstrap.image.trees import Trees

    with suppress(FirebuildError, OSError):
        LayerTrees(store, Trees(Sandbox(idmap))).settle()


def await_end(lifeline: int, parent: int) -> None:
    """Wait until the pipe `lifeline` is closed everywhere.

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


def main(lifeline: int = 0, told: int | None = None) -> None:
    """Wait for the end of the pipe `lifeline`, move the directory away, close `told`, and remove it."""
    if len(sys.argv) == 2:
        sweep(Path(sys.argv[1]))
        return
    directory, idmap, parent = Path(sys.argv[1]), IdMap.from_json(json.loads(sys.argv[2])), int(sys.argv[3])
    await_end(lifeline, parent)
    retired = retire(directory)
    if told is not None and retired != directory:
        os.close(told)
    remove(retired, idmap)
    settle(directory.parent.parent, idmap)


if __name__ == "__main__":
    main(0, 1)
