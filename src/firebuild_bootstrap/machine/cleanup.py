"""Removes a build's directory after the build is gone, however it went.

Runs as `python -m firebuild_bootstrap.machine.cleanup DIRECTORY ID-MAP LAYERS FIREBUILD-PID`; LAYERS is the
name of the store of layers in that mapping. Standard input is a pipe whose writing ends are held by firebuild
and by each of its sandboxes: its end means that all are gone. Sandboxes die with firebuild; one that has not
a few seconds after it is ended from here. The directory is moved out of the way first, by firebuild itself
if it leaves in order: it says where to, and does not wait.

With the store as its only argument it removes what builds left behind whose cleanup died too.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from firebuild_bootstrap.polling import readable

# Each build starts this program, to wait most of the time: what it does afterwards it imports afterwards.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from firebuild_bootstrap.sandbox import IdMap

LOCK: Final = "lock"
"""A file beside the directories of builds or runs, locked by whoever makes or retires one."""
_GRACE_SECONDS: Final = 2.0
_CHECK_SECONDS: Final = 0.5


def retire(directory: Path) -> Path:
    """Clear the leftovers of `<store>/builds/ID`, move it to `<store>/removing`, and return where it is now.

    It stays where it is if it can't be moved, for example because `builds` is a file system of its own.
    """
    import glob
    import secrets

    from firebuild_bootstrap.machine import leftovers

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


def remove(directory: Path, idmap: Callable[[], IdMap]) -> None:
    """Remove `directory`: what only its id mapping may remove from in there, and the rest from here."""
    from firebuild_bootstrap.removal import remove_tree

    if os.geteuid() != 0:
        from firebuild_bootstrap.errors import MachineError
        from firebuild_bootstrap.sandbox import Bind, Sandbox, find_runtime

        runtime = find_runtime()
        binds = [*runtime.binds, Bind(directory.parent, "/builds", read_only=False)]
        command = runtime.module("firebuild_bootstrap.removal", f"/builds/{directory.name}")
        with suppress(MachineError):
            Sandbox(idmap()).run(command, binds=binds, env=runtime.env)
    remove_tree(directory, ignore_errors=True)


def own(directory: Path, kind: int = fcntl.LOCK_EX) -> int:
    """Return a descriptor that holds the lock of the directory of a build or run.

    Raises:
        OSError: it can't be opened, or who holds it lives (BlockingIOError).
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
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
        with suppress(OSError):  # a file, a running build, or another user's
            lock = own(entry)
            try:
                yield entry
            finally:
                os.close(lock)


def sweep(store: Path) -> None:
    """Remove what dead builds left in `store`."""
    from firebuild_bootstrap.image.content_store import lock_file
    from firebuild_bootstrap.image.layertrees import store_name
    from firebuild_bootstrap.sandbox import detect

    builds = store / "builds"
    if builds.is_dir():
        with lock_file(builds / LOCK):
            for entry in abandoned(builds):
                retire(entry)
    idmap = detect()
    for folder in (store / "removing", builds):
        for entry in abandoned(folder):
            remove(entry, lambda: idmap)
    settle(store, store_name(idmap), lambda: idmap)


def settle(store: Path, layers: str, idmap: Callable[[], IdMap]) -> None:
    """Remove what dead commands have half-made in `store`, and see to it that finished layers last.

    Args:
        layers: name of the store of layers in the id mapping.
        idmap: returns the id mapping, which few things need.
    """
    from firebuild_bootstrap.errors import FirebuildError
    from firebuild_bootstrap.image.content_store import ContentStore
    from firebuild_bootstrap.orphans import end_orphans

    def remove_tree(path: Path) -> None:
        from firebuild_bootstrap.image.trees import Trees
        from firebuild_bootstrap.sandbox import Sandbox

        Trees(Sandbox(idmap())).remove(path)

    end_orphans(store)
    with suppress(FirebuildError, OSError):
        ContentStore(store / "layers" / layers, remove_tree, durable=False, sweeping=False).settle("layer")


def await_end(lifeline: int, parent: int) -> bytes:
    """Wait until the pipe `lifeline` is closed everywhere, and return what firebuild wrote to it last.

    Args:
        parent: process id of firebuild. Once it is gone or has said that it leaves, the others that hold
            the pipe have a grace of a few seconds before they are ended.
    """
    left: float | None = None
    said = b""
    while True:
        ready = readable(lifeline, seconds=_CHECK_SECONDS)
        if ready:
            word = os.read(lifeline, 4096)
            if not word:
                return said
            said += word
        if left is None and (ready or os.getppid() != parent):
            left = time.monotonic()
        if left is not None and time.monotonic() - left > _GRACE_SECONDS:
            from firebuild_bootstrap.orphans import end_holders

            end_holders(lifeline)


def main(lifeline: int = 0) -> None:
    """Wait for the end of the pipe `lifeline`; move the directory, unless firebuild has, and remove it."""
    if len(sys.argv) == 2:
        from pathlib import Path

        sweep(Path(sys.argv[1]))
        return
    said = await_end(lifeline, int(sys.argv[4]))
    from pathlib import Path

    directory = Path(sys.argv[1])
    remove(Path(os.fsdecode(said)) if said else retire(directory), _idmap)
    settle(directory.parent.parent, sys.argv[3], _idmap)


def _idmap() -> IdMap:
    """Return the id mapping of the arguments."""
    import json

    from firebuild_bootstrap.sandbox import IdMap

    return IdMap.from_json(json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
