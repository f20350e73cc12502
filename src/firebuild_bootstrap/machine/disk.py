"""The root drive of a virtual machine: an ext4 file made from a base, and read back without mounting it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.image.outputs import (
    Artifact,
    OutputSpec,
    OutputType,
    artifact,
    export_tree,
    require_e2fsprogs,
)
from firebuild_bootstrap.image.trees import PackedFile, file_size
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.machine.base import Layer
from firebuild_bootstrap.machine.rootfs import fill_tree, unpack_notes
from firebuild_bootstrap.machine.sparse import move_sparse
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.sandbox import Bind

_MIB: Final = 1 << 20
# Free space beside the base, where no size is asked for; holes take no space on the host.
_FREE: Final = 2 << 30
# e2fsck(8): 1 means that all errors were corrected.
_CONTENT: Final = (0, 1)


class Disk:
    """The drive of one machine, a file in the build's workspace.

    The order is fill, the machine's run, export. Everything that reads what a guest wrote runs in the build's
    sandbox, without network and with nothing else in sight.

    Args:
        workspace: the build's directory.
        size: bytes of the drive; None for what the base takes and 2 GiB.
        epoch: seconds since 1970 for reproducible outputs (SOURCE_DATE_EPOCH), None for the real times.
        notice: told what an export could not keep.

    Raises:
        MachineError: e2fsprogs is missing.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        *,
        size: int | None = None,
        epoch: int | None = None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        require_e2fsprogs("the machine's drive", ("mke2fs", "e2fsck", "debugfs", "resize2fs"))
        self.path = workspace.path / "disk.ext4"
        self._workspace = workspace
        self._trees = workspace.trees()
        self._size = size
        self._epoch = epoch
        self._notice = notice

    def fill(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Make the drive from `layers`, the lowest first; without any it is empty.

        Returns:
            what could not be kept of them.

        Raises:
            InputError: they do not fit into `size`.
            MachineError: the host's disk is full.
        """
        root = self._directory("base")
        with closing(self._workspace.layer_trees()) as stored:
            notes = fill_tree(self._trees, stored, layers, root)
        made = self._trees.ext4(root, self.path, Ext4Options(free=_MIB))
        self._trees.remove(root)
        self._grow(made.size)
        return notes

    def export(self, outputs: Sequence[OutputSpec], into: Path) -> tuple[Artifact, ...]:
        """Check the drive, and write what is on it into the directory `into`, once for each output.

        The machine has to have ended. The drive is used up by this.

        Raises:
            MachineError: the file system is damaged, or the host's disk is full.
        """
        archive = self._workspace.path / "disk.tar"
        packed = self._read(archive)
        made = {}
        # As it is, it keeps owners and devices even where this user could not make such files.
        as_it_is = [spec for spec in outputs if spec.type is OutputType.TAR and self._epoch is None]
        others = [spec for spec in outputs if spec not in as_it_is]
        if others:
            made = {one.type: one for one in self._export_tree(archive, others, into)}
        for spec in as_it_is:
            made[spec.type] = self._hand_over(archive, spec, into / spec.type.file_name, packed)
        archive.unlink(missing_ok=True)
        return tuple(made[spec.type] for spec in outputs)

    def keep(self, into: Path) -> None:
        """Move the drive as it is into the directory `into`, if there is one.

        Raises:
            MachineError: the disk is full.
        """
        if self.path.exists():
            move_sparse(self.path, into / self.path.name, self._workspace.check)

    def _read(self, archive: Path) -> PackedFile:
        with self._workspace.tasks.task("checking the machine's drive", total=file_size(self.path)):
            self._run("e2fsck", "-f", "-p", "/disk/disk.ext4", accept=_CONTENT)
        packed = self._trees.pack_image(self.path, archive)
        self.path.unlink()
        return packed

    def _export_tree(self, archive: Path, outputs: Sequence[OutputSpec], into: Path) -> tuple[Artifact, ...]:
        root = self._directory("rootfs")
        for note in unpack_notes(self._trees.unpack(archive, root), "the machine's drive"):
            self._notice(note)
        return export_tree(self._trees, root, outputs, into, epoch=self._epoch)

    def _hand_over(self, archive: Path, spec: OutputSpec, target: Path, packed: PackedFile) -> Artifact:
        try:
            shutil.move(archive, target)
        except OSError as error:
            raise MachineError(f"{target} could not be written: {error.strerror}") from error
        return artifact(spec, target, packed)

    def _grow(self, made: int) -> None:
        size = made + _FREE if self._size is None else self._size // _MIB * _MIB
        if size < made:
            raise InputError(
                f"machine.disk_size: expected room for the base, which takes {-(-made // _MIB)} MiB, "
                f"found {size // _MIB} MiB",
                hint="raise it, or leave it out",
            )
        # With the size the number of inodes grows, which mke2fs has kept to what the base needs.
        with self._workspace.tasks.task("enlarging the machine's drive"):
            self._run("resize2fs", "/disk/disk.ext4", f"{size // 1024}K", accept=(0,))

    def _run(self, *command: str, accept: Sequence[int]) -> None:
        """Run a program of e2fsprogs on the drive, in the sandbox."""
        runtime = self._workspace.runtime
        binds = [*runtime.binds, Bind(self.path, "/disk/disk.ext4", read_only=False)]
        done = self._workspace.sandbox.run(command, binds=binds)
        if done.returncode not in accept:
            words = (done.stdout + done.stderr).decode("utf-8", "replace").strip()[-500:]
            raise MachineError(
                f"{command[0]} is not content with the machine's drive (status {done.returncode}): {words}",
                hint="the machine did not end cleanly",
            )

    def _directory(self, name: str) -> Path:
        path = self._workspace.path / name
        try:
            path.mkdir(mode=0o755)
        except OSError as error:
            raise MachineError(f"{path}: {error.strerror}") from error
        return path
