"""Cache mounts of RUN as they lie on the disk: what there is, and removing it.

<home>/cache-mounts/<id mapping>/<digest of the id>/
    id          the id, as it is in the Dockerfile
    <n>/lock    held by the build that uses the directory; its time is that of the last use
    <n>/data/   the content
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.image.content_store import files_in, may_enter, try_lock
from firebuild_bootstrap.image.trees import allocated
from firebuild_pki.values import dataclass

_MAX_ID: Final = 4096


@dataclass(frozen=True)
class CacheMountUsage:
    """A directory that RUN steps mount.

    Args:
        id: what the Dockerfile calls it.
        path: the directory with its lock and its content.
        size: bytes that it takes on the disk.
        last_used: seconds since 1970.
        in_use: a RUN has it at this moment.
    """

    id: str
    path: Path
    size: int
    last_used: float
    in_use: bool


def cache_mounts(home: Path) -> list[CacheMountUsage]:
    """Return the cache mounts of a store that this user may enter, least recently used first."""
    found: list[CacheMountUsage] = []
    folders = [home / "cache-mounts"]
    for _ in range(3):
        folders = [below for folder in filter(may_enter, folders) for below in files_in(folder)]
    for lock in (folder / "lock" for folder in folders):
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # being removed, or another's
            with _locked(lock) as free:
                in_use = not free
            last_used = os.stat(lock).st_mtime
            found.append(CacheMountUsage(_name(lock), lock.parent, allocated(lock.parent), last_used, in_use))
    return sorted(found, key=lambda mount: mount.last_used)


def prune_cache_mounts(
    home: Path, remove: Callable[[Path], None], wanted: Callable[[CacheMountUsage], bool]
) -> list[CacheMountUsage]:
    """Remove the cache mounts that are `wanted` away, but those that a RUN uses.

    Args:
        home: the store.
        remove: removes a tree that may hold files of foreign owners.
        wanted: asked for each, least recently used first.

    Returns:
        what was removed.
    """
    removed: list[CacheMountUsage] = []
    for mount in cache_mounts(home):
        if mount.in_use or not wanted(mount):
            continue
        # Swept by later builds and commands, should this process end amid the removal.
        away = home / "removing" / f"mount.{secrets.token_hex(8)}"
        with suppress(FileNotFoundError), _locked(mount.path / "lock") as free:
            if not free:
                continue
            away.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(mount.path, away)  # a waiter for the lock sees that, and starts again
            removed.append(mount)
        remove(away)
    return removed


def _name(lock: Path) -> str:
    try:
        with open(lock.parent.parent / "id", "rb") as file:
            return file.read(_MAX_ID).decode(errors="replace")
    except FileNotFoundError:
        return lock.parent.parent.name


@contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Hold a lock for the length of the block; False if it is taken."""
    descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)
