"""Snapshot drives: the merged view of layers as a read-only ext4 file, for virtual machines.

    <home>/drives/<form>-<mapping>/     a `ContentStore`
        content/<id>/snapshot.ext4      the drive
        content/<id>/layers             the names of its layers, for people

A drive is written once for each sequence of layers; any number of machines and builds use it at once. It can
be made again from its layers, so nobody waits until it is on the disk: after a restart of this host, which
may have lost a part of it, it is not found. Those that were not used for longest go first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.image.content_store import ContentStore, files_in, may_enter
from firebuild_bootstrap.image.layertrees import (
    ArchiveLayer,
    Layer,
    LayerTrees,
    StoredLayer,
    boot_id,
    making,
    store_name,
)
from firebuild_bootstrap.image.trees import Trees, allocated
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.layers.apply import UnpackReport
from firebuild_bootstrap.removal import remove_tree
from firebuild_pki.values import dataclass

_DRIVE: Final = "snapshot.ext4"
_LAYERS: Final = "layers"
_KEPT: Final = 8  # without being in use: a stage that is being worked on needs one or two


class SnapshotDrives:
    """The drives of one id mapping.

    Args:
        home: the directory of the store.
        trees: the tools in that id mapping.
        stored: the layers.
        check: called again and again while another build is waited for; may raise.
    """

    def __init__(
        self, home: Path, trees: Trees, stored: LayerTrees, *, check: Callable[[], None] = lambda: None
    ) -> None:
        self._root = home / "drives" / store_name(trees.sandbox.idmap)
        self._trees = trees
        self._stored = stored
        self._check = check
        self._contents = ContentStore(self._root, durable=False)

    def close(self) -> None:
        """Let go of the drives that `hold` gave out."""
        self._contents.close()

    def hold(self, layers: Sequence[Layer]) -> tuple[Path, UnpackReport]:
        """Return the drive of `layers`, the lowest first, held until `close`, and what it could not keep.

        Args:
            layers: without any the drive is empty; only the lowest may be an archive.

        Raises:
            MachineError: one is not in the store or damaged, or the disk is full.
        """
        report = UnpackReport()
        if layers and isinstance(bottom := layers[0], ArchiveLayer):
            report = self._stored.unpacked(bottom.path, bottom.digest)[1]
        names = [each.key if isinstance(each, StoredLayer) else each.digest for each in layers]
        name = hashlib.sha256(json.dumps([boot_id(), *names]).encode()).hexdigest()
        content = self._contents.hold((name,))
        if content is None:
            with making(self._root, name, self._trees.tasks, "writes the same drive", self._check):
                content = self._contents.hold((name,)) or self._make(name, names, layers)
        with suppress(OSError):
            os.utime(content)
        return content / _DRIVE, report

    def _make(self, name: str, names: Sequence[str], layers: Sequence[Layer]) -> Path:
        with self._contents.stage() as staging:
            drive = staging.path / _DRIVE
            # What is in the guest's memory of it needs no room, and nobody writes to it.
            options = Ext4Options(free=0, label="snapshot", journal=False, internal=True)
            self._trees.ext4(self._stored.merged(layers), drive, options)
            drive.chmod(0o444)  # another user may run the machine; others do not get into this directory
            (staging.path / _LAYERS).write_text("".join(f"{each}\n" for each in names), "utf-8")
            content = self._contents.publish(staging, (name,))
        held = self._contents.hold((name,))
        self._forget()
        return held or content

    def _forget(self) -> None:
        oldest = sorted(self._contents.names(), key=lambda key: _last_used(self._contents.link(key)))
        for key in oldest[:-_KEPT]:
            self._contents.discard(key, unused=True)


@dataclass(frozen=True)
class DriveUsage:
    """A snapshot drive.

    Args:
        layers: how many it was made of.
        path: its directory.
        size: bytes that it takes on the disk.
        last_used: seconds since 1970.
        in_use: a machine has it at this moment.
    """

    layers: int
    path: Path
    size: int
    last_used: float
    in_use: bool


def snapshot_drives(home: Path) -> list[DriveUsage]:
    """Return the snapshot drives of a store that this user may enter, least recently used first."""
    found = []
    for root in filter(may_enter, files_in(home / "drives")):
        contents = ContentStore(root)
        for key in contents.names():
            path = contents.link(key)
            with suppress(FileNotFoundError, PermissionError):  # it is being removed, or another user's
                count = len((path / _LAYERS).read_text("utf-8").splitlines())
                size = allocated(path.resolve())
                found.append(DriveUsage(count, path, size, _last_used(path), contents.in_use(key)))
    return sorted(found, key=lambda drive: drive.last_used)


def prune_snapshot_drives(home: Path) -> list[DriveUsage]:
    """Remove all drives but those that a machine uses: they can be made again.

    Returns:
        what was removed.

    Raises:
        InputError, MachineError: the store can't be written.
    """
    removed = []
    for drive in snapshot_drives(home):
        contents = ContentStore(drive.path.parent.parent, remove_tree, durable=False)
        if contents.discard((drive.path.name,), unused=True):
            removed.append(drive)
    return removed


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
