"""Whether an overlay works on a file system: it is tried, with all that a build needs of one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress

from firebuild_bootstrap.guest import kernel
from firebuild_bootstrap.guest.overlay import mount_layers
from firebuild_bootstrap.removal import remove_tree


def problem(directory: str) -> str:
    """Return why no overlay can have its upper directory in `directory`; empty when one can."""
    place = tempfile.mkdtemp(prefix="overlay-", dir=directory)
    merged = f"{place}/merged"
    try:
        return _tried(place, merged)
    except OSError as error:
        return f"{error.strerror or error}"
    finally:
        with suppress(OSError):
            kernel.unmount(merged)
        remove_tree(place, ignore_errors=True)


def _tried(place: str, merged: str) -> str:
    for name in (merged, *(f"{place}/{name}" for name in ("empty", "lower/old", "upper", "work"))):
        os.makedirs(name, exist_ok=True)
    for name in ("gone", "old/hidden"):
        _touch(f"{place}/lower/{name}")
    mount_layers(place, ["empty", "lower"], merged, "upper", "work")
    os.unlink(f"{merged}/gone")
    os.unlink(f"{merged}/old/hidden")
    os.rmdir(f"{merged}/old")
    os.mkdir(f"{merged}/old")  # opaque now, which takes an extended attribute
    kernel.unmount(merged)
    # What it has left has to mean the same as a lower layer.
    mount_layers(place, ["lower", "upper"], merged)
    found = sorted(os.listdir(merged)), os.listdir(f"{merged}/old")
    return "" if found == (["old"], []) else f"files that were removed come back: {found}"


def _touch(path: str) -> None:
    with open(path, "wb"):
        pass
