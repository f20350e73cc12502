"""An ext4 file made from layers, and read back without being mounted: for guests that send no layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer
from firebuild_bootstrap.image.outputs import require_program
from firebuild_bootstrap.image.trees import file_size
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.machine.rootfs import unpack_notes
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.sandbox import Bind

_MIB: Final = 1 << 20
# Free space beside the base, where no size is asked for; holes take no space on the host.
_FREE: Final = 2 << 30
_BYTES_PER_INODE: Final = 16384  # as mke2fs has it where it is not told the number of files
# e2fsck(8): 1 means that all errors were corrected.
_CONTENT: Final = (0, 1)


class Disk:
    """A file in the build's workspace with the root file system of a machine.

    What a guest wrote is read in the build's sandbox, without network and with nothing else in sight.

    Args:
        workspace: the build's directory.
        size: bytes of the drive; None for what the base takes and 2 GiB.

    Raises:
        MachineError: e2fsck is missing.
    """

    def __init__(self, workspace: BuildDirectory, *, size: int | None = None) -> None:
        require_program("the machine's drive", "e2fsck", "e2fsprogs")
        self.path = workspace.path / "disk.ext4"
        self._workspace = workspace
        self._trees = workspace.trees()
        self._size = None if size is None else size // _MIB * _MIB

    def fill(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Make the drive from `layers`, the lowest first; without any it is empty.

        Returns:
            what could not be kept of them.

        Raises:
            InputError: they do not fit into `size`.
            MachineError: the host's disk is full.
        """
        inodes = (self._size or _FREE) // _BYTES_PER_INODE
        options = Ext4Options(free=_FREE, size=self._size or 0, inodes=inodes)
        notes: tuple[str, ...] = ()
        with closing(self._workspace.layer_trees()) as stored:
            if layers and isinstance(bottom := layers[0], ArchiveLayer):
                notes = unpack_notes(stored.unpacked(bottom.path, bottom.digest)[1])
            try:
                self._trees.ext4(stored.merged(layers), self.path, options)
            except InputError as error:
                raise InputError(
                    f"machine.disk_size: expected room for the base, found {(self._size or 0) // _MIB} MiB",
                    hint="raise it, or leave it out",
                ) from error
        return notes

    def read(self) -> ArchiveLayer:
        """Check the drive, and return what is on it. The drive is used up by this.

        Raises:
            MachineError: the file system is damaged, or the host's disk is full.
        """
        runtime = self._workspace.runtime
        with self._workspace.tasks.task("checking the machine's drive", total=file_size(self.path)):
            binds = [*runtime.binds, Bind(self.path, "/disk/disk.ext4", read_only=False)]
            done = self._workspace.sandbox.run(["e2fsck", "-f", "-p", "/disk/disk.ext4"], binds=binds)
        if done.returncode not in _CONTENT:
            words = (done.stdout + done.stderr).decode("utf-8", "replace").strip()[-500:]
            raise MachineError(
                f"e2fsck found damage on the machine's drive (status {done.returncode}): {words}",
                hint="the machine did not end cleanly",
            )
        archive = Path(f"{self.path}.tar")
        packed = self._trees.pack_image(self.path, archive)
        self.path.unlink()
        return ArchiveLayer(archive, packed.digest)
