"""The drive of an external machine: a file that its own tool gives it, read back when it is unmounted."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, Self

from firebuild_bootstrap.errors import MAKE_ROOM, InputError, MachineError
from firebuild_bootstrap.image.layertrees import ArchiveLayer, Layer
from firebuild_bootstrap.image.outputs import require_program
from firebuild_bootstrap.image.trees import file_size
from firebuild_bootstrap.image.worker.ext4 import Ext4Options
from firebuild_bootstrap.layers.tree import copy_file
from firebuild_bootstrap.machine.external.targets import Note, OutsideFile
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.sandbox import Bind
from firebuild_pki.values import dataclass

_OFFSET: Final = 1024
_FIELDS: Final = struct.Struct("<44x I 4x H 2x H H 36x I")  # s_mtime, s_mnt_count, s_magic, s_state, incompat
_MAGIC: Final = 0xEF53
_CLEANLY_UNMOUNTED: Final = 0x0001
_NEEDS_RECOVERY: Final = 0x0004
_SETTING: Final = "machine.external.disk"
_KEEP: Final = "remove it, or set fill_disk: false if the machine is to use it as it is"
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Superblock:
    """The state of a file system.

    Args:
        mounts: how often it was mounted, and
        mounted_at: when last, by the clock of the machine that mounted it.
        clean: it is not mounted for writing.
    """

    mounts: int
    mounted_at: int
    clean: bool

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the state of the file system in `path`.

        The kernel sets "needs recovery" before a mount is ready, and takes it back as the last write of an
        unmount (or of a change to read-only), when everything else is on the drive.

        Raises:
            MachineError: the file can't be read, or holds no ext4.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, _FIELDS.size, _OFFSET)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MachineError(f"the machine's drive {path} can't be read: {error.strerror}") from error
        if len(data) == _FIELDS.size:
            mounted_at, mounts, magic, state, features = _FIELDS.unpack(data)
            if magic == _MAGIC:
                clean = bool(state & _CLEANLY_UNMOUNTED) and not features & _NEEDS_RECOVERY
                return cls(mounts, mounted_at, clean)
        raise MachineError(
            f"the machine's drive {path} holds no ext4 file system",
            hint="machine.external.disk is a file with ext4 on it, without a partition table",
        )

    def same_mount(self, other: Superblock) -> bool:
        """Whether it was not mounted between the two."""
        return (self.mounts, self.mounted_at) == (other.mounts, other.mounted_at)


class ExternalDrive:
    """A file with ext4 on it that a machine writes to while the build runs.

    firebuild does not see the machine, so it goes by the file system: the machine is done with the drive when
    it has been mounted during this build and is cleanly unmounted again.

    Args:
        path: the file.
        fill: make it from the base, and remove it at the end.
        disk: makes file systems from layers, and reads them, in the build's own directory.
        check: called again and again while something long goes on; may raise.
        note: see `OutsideFile`.
    """

    def __init__(
        self,
        path: Path,
        *,
        fill: bool,
        disk: Disk,
        check: Callable[[], None] = lambda: None,
        note: Note = lambda _: None,
    ) -> None:
        self._path = path
        self._fill = fill
        self._disk = disk
        self._check = check
        self._before: Superblock | None = None
        self._file = OutsideFile(path, note)

    def check(self) -> None:
        """Find out whether the file is there, or can be made.

        Raises:
            FirebuildError: it is not, or can't.
        """
        if not self._fill:
            if not self._path.is_file():
                raise InputError(
                    f"{_SETTING}: {self._path} is not a file",
                    hint="make it, or leave that to firebuild with fill_disk: true",
                )
            Superblock.read(self._path)
            return
        if os.path.lexists(self._path):
            raise InputError(
                f"{_SETTING}: {self._path} exists, and would be overwritten with the base",
                hint=_KEEP,
            )
        if not self._path.parent.is_dir() or not os.access(self._path.parent, os.W_OK):
            raise InputError(
                f"{_SETTING}: {self._path.parent} is not a directory that can be written to",
                hint="make it, or let this user write there",
            )

    def prepare(self, layers: Sequence[Layer]) -> tuple[str, ...]:
        """Make the file from `layers`, if that is to be done, and note its state.

        Returns:
            what could not be kept of them.

        Raises:
            FirebuildError: the file can't be made.
        """
        notes: tuple[str, ...] = ()
        if self._fill:
            notes = self._disk.fill(layers)
            self._place()
        self._before = Superblock.read(self._path)
        return notes

    def released(self) -> bool:
        """Whether the machine has had the drive, and is done with it."""
        if self._before is None:
            return False
        now = Superblock.read(self._path)
        return now.clean and not now.same_mount(self._before)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until the machine is done with the drive; return whether it is."""
        deadline = time.monotonic() + timeout
        while not self.released():
            if time.monotonic() >= deadline:
                return False
            self._check()
            time.sleep(_POLL_SECONDS)
        return True

    def read(self, *, end_timeout: float) -> ArchiveLayer:
        """Return what is on the drive, which stays as it is.

        Args:
            end_timeout: seconds that the machine may take until it is done with it.

        Raises:
            MachineError: it is not, or it never had it.
        """
        state = Superblock.read(self._path)
        if self._before is None or state.same_mount(self._before):
            raise MachineError(
                f"the build succeeded, but not on {self._path}: the guest never mounted it",
                hint="give the machine this file as the drive that the guest works on",
            )
        if not self.wait(end_timeout):
            raise MachineError(
                f"the machine still has its drive {self._path} mounted",
                hint="let it end by itself after the build: what is not unmounted may not be complete. "
                "machine.external.end_timeout is how long it may take",
            )
        state = Superblock.read(self._path)
        copy_sparse(self._path, self._disk.path, self._check)
        if Superblock.read(self._path) != state:
            raise MachineError(
                f"{self._path} was mounted again while it was read",
                hint="leave the drive alone until the build has ended",
            )
        return self._disk.read()

    def keep(self) -> Path | None:
        """Leave the file where it is, and return its path; None where `close` would not remove it anyway."""
        return self._path if self._file.stay() else None

    def close(self) -> None:
        """Remove the file if firebuild made it and it still is that file. Idempotent."""
        self._file.remove()

    def _place(self) -> None:
        """Put the new drive where the machine's tool expects it; nothing is there before it is complete."""
        fresh = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._file.announce_part(fresh)
        try:
            copy_sparse(self._disk.path, fresh, self._check)
            try:
                # Unlike a rename, a link never replaces a file that was made meanwhile.
                self._file.appear(fresh, os.link)
            except FileExistsError:
                raise InputError(
                    f"{_SETTING}: {self._path} exists, and would be overwritten", hint=_KEEP
                ) from None
            finally:
                fresh.unlink()
            self._disk.path.unlink()
        except OSError as error:
            raise MachineError(
                f"{_SETTING}: {self._path} can't be made: {error.strerror}",
                hint=MAKE_ROOM,
            ) from error


def copy_sparse(source: Path, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy a file to the new file `target`, mode 0600; holes stay holes.

    Args:
        check: called between pieces; what it raises ends the copy and removes the target.

    Raises:
        MachineError: the disk is full, or a file can't be read or written.
    """
    try:
        with open(source, "rb") as reading:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(descriptor, "wb") as writing:
                    copy_file(reading.fileno(), writing.fileno(), check)
            except BaseException:
                target.unlink()
                raise
    except OSError as error:
        raise MachineError(
            f"{source} can't be copied to {target}: {error.strerror}",
            hint="make room there, or let this user read the drive and write there",
        ) from error


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
                notes = stored.unpacked(bottom.path, bottom.digest)[1].notes()
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
