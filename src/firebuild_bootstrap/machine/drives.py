"""The drives of a virtual machine that works on layers, and the layers that its guest sends.

The first is a snapshot of what its steps start from, read-only (`image.drives`). The second is empty but for
layers that lie between those that the steps make, and goes with the machine. The others hold cache mounts,
one each, and outlive the build:

    <home>/cache-mounts/vm/<SHA-256 of the id>/
        id          the id, as it is in the Dockerfile
        <n>/lock    held as long as a machine has the drive
        <n>/data    the drive

Only guests mount them: what a guest has written there means nothing to this host.
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, Interrupted, MachineError
from firebuild_bootstrap.guest.caches import try_lock
from firebuild_bootstrap.image.content_store import write_whole
from firebuild_bootstrap.image.layertrees import ALTERED, TREE, ArchiveLayer, Layer, LayerSink, StoredLayer
from firebuild_bootstrap.image.outputs import OutputType
from firebuild_bootstrap.image.trees import tree_of
from firebuild_bootstrap.image.worker.ext4 import Ext4Options, make_empty_ext4
from firebuild_bootstrap.initramfs import Compression, StaticAddress, initramfs_image, kernel_arguments
from firebuild_bootstrap.layers.tar import LayerError, write_all
from firebuild_bootstrap.machine.base import FINISHED, GuestOptions, Machine, Taken
from firebuild_bootstrap.machine.console import keep_console
from firebuild_bootstrap.machine.workspace import BuildDirectory
from firebuild_bootstrap.wire import CacheMount
from firebuild_pki.display import counted
from firebuild_pki.values import dataclass

VM_CACHES: Final = "cache-mounts/vm"
"""Where drives of cache mounts are kept, in the directory of the store."""
SCRATCH_BYTES: Final = 16 << 30
"""Size of a scratch drive by default, and of a layer at most; holes take no space on the host."""
_CACHE_SIZE: Final = 64 << 30
_MIB: Final = 1 << 20
MAX_CACHES: Final = 4
"""Drives of cache mounts: QEMU's microvm has eight devices, and four are taken."""
_PAUSE: Final = 0.1
_MOST_PRIVATE: Final = 1000


@dataclass(frozen=True)
class CacheDrive:
    """The drive of a cache mount: its file, and the SHA-256 of the id, by which the guest knows it."""

    path: Path
    name: str


class Drives:
    """All drives of one machine. Close them when it has ended.

    Args:
        workspace: the build's directory.
        caches: where those of cache mounts are kept.
        size: bytes of the scratch drive; None for 16 GiB, which take space only as they are used.
        notice: told what the user should know.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        *,
        caches: Path,
        size: int | None = None,
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._workspace = workspace
        self._size = SCRATCH_BYTES if size is None else size // _MIB * _MIB
        self._notice = notice
        self._trees = workspace.trees()
        self._stored = workspace.layer_trees()
        self._snapshots = workspace.snapshot_drives(self._stored)
        self._directory = caches
        self._layers: tuple[Layer, ...] = ()
        self._between: dict[int, Path] = {}
        self._locks: list[int] = []
        self._received: SentLayers | None = None
        self.snapshot = Path()
        self.scratch = workspace.path / "scratch.ext4"
        self.caches: tuple[CacheDrive, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that are written to: the scratch drive, and those of cache mounts."""
        return (self.scratch, *(cache.path for cache in self.caches))

    def prepare(self, layers: Sequence[Layer], caches: Sequence[CacheMount] = ()) -> tuple[str, ...]:
        """Make them ready.

        Args:
            layers: what the steps start from, the lowest first; and those of steps that need not be executed,
                which the guest finds on the scratch drive (guest/overlay.py).
            caches: cache mounts that the steps use; those of this machine wait for those of others.

        Returns:
            notes for the user.

        Raises:
            InputError: layers do not fit on the scratch drive.
            MachineError: the host's disk is full.
        """
        for layer in layers:
            if isinstance(layer, StoredLayer) and layer.step:
                self._between[layer.step] = self._stored.required(layer.key)
            else:
                self._layers += (layer,)
        self.snapshot, report = self._snapshots.hold(self._layers)
        self._make_scratch()
        ids = {mount.id: mount for mount in caches}
        for mount in (ids[each] for each in sorted(ids)[:MAX_CACHES]):
            self.caches += (self._cache(mount),)
        notes = report.notes()
        if len(ids) > MAX_CACHES:
            notes += (f"a machine keeps {MAX_CACHES} cache mounts; the others last as long as this stage",)
        return notes

    def receiver(self, taken: Taken) -> SentLayers:
        """Return what takes the layers that the guest sends; see `Machine.receiver`."""
        self._received = SentLayers(self._workspace, self._size, taken, self._notice)
        return self._received

    def keep(self, into: Path) -> None:
        """Write what the finished steps have made into the directory `into`, as one archive.

        Raises:
            MachineError: the disk is full.
        """
        if not self.scratch.exists():
            return
        lower = self._stored.merged(self._layers)
        made = self._between | (self._received.trees if self._received is not None else {})
        lowest = (lower,) if isinstance(lower, Path) else lower
        tree = tree_of((*lowest, *(made[step] for step in sorted(made))))
        self._trees.pack(tree, into / OutputType.TAR.file_name)

    def close(self) -> None:
        """Let go of all that others may use. Idempotent."""
        while self._locks:
            os.close(self._locks.pop())
        self._snapshots.close()
        self._stored.close()

    def _make_scratch(self) -> None:
        if not self._between:
            self._make(self.scratch, self._size, journal=False)
            return
        places = {f"layers/between/{step}": tree for step, tree in self._between.items()}
        try:
            options = Ext4Options(free=0, size=self._size, label="", journal=False, internal=True)
            self._trees.ext4_of(places, self.scratch, options)
        except InputError as error:
            raise InputError(
                f"the layers of {len(places)} cached steps do not fit into the machine's drive "
                f"of {counted(self._size, 'byte')}",
                hint="raise machine.disk_size",
            ) from error

    def _make(self, path: Path, size: int, *, journal: bool) -> None:
        try:
            make_empty_ext4(str(path), size, journal=journal)
        except LayerError as error:
            raise MachineError(f"{path}: {error.message}", hint=error.hint or None) from error
        except OSError as error:
            raise MachineError(f"{path} could not be written: {error.strerror}") from error

    def _cache(self, mount: CacheMount) -> CacheDrive:
        name = hashlib.sha256(mount.id.encode()).hexdigest()
        folder = self._directory / name
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if not (folder / "id").exists():
                write_whole(folder / "id", mount.id.encode())
            place, lock = self._locked(folder, mount)
            self._locks.append(lock)
            os.utime(lock)  # the last use, for who has to choose what goes
            drive = place / "data"
            if not drive.exists():
                fresh = place / "new"
                fresh.unlink(missing_ok=True)  # left by a process that was killed: only one has the lock
                self._make(fresh, _CACHE_SIZE, journal=True)
                fresh.rename(drive)
        except OSError as error:
            raise MachineError(f"{error.filename or folder}: {error.strerror}") from error
        return CacheDrive(drive, name)

    def _locked(self, folder: Path, mount: CacheMount) -> tuple[Path, int]:
        """Return a directory of the cache that nobody else has now, and the descriptor of its lock."""
        for number in range(_MOST_PRIVATE if mount.sharing == "private" else 1):
            place = folder / str(number)
            if (lock := try_lock(str(place))) is not None:
                return place, lock
        place = folder / "0"
        if mount.sharing == "shared":
            self._notice(f"only one virtual machine at a time can have the cache mount {mount.id!r:.200}")
        with self._workspace.tasks.task(f"waiting for the cache mount {mount.id!r:.200}"):
            while (lock := try_lock(str(place))) is None:
                self._workspace.check()
                time.sleep(_PAUSE)
        return place, lock


class SentLayers:
    """Takes the layers that a guest sends, and unpacks each in the sandbox.

    A guest that has no layers to give, because it works on one plain tree, sends nothing.

    Args:
        workspace: the machine's directory.
        limit: bytes of a layer, at most.
        taken: is given each, as soon as it is complete.
        notice: told what could not be kept.
    """

    def __init__(
        self, workspace: BuildDirectory, limit: int, taken: Taken, notice: Callable[[str], None]
    ) -> None:
        self._workspace = workspace
        self._limit = limit
        self._taken = taken
        self._notice = notice
        self._archive = workspace.path / "layers" / "incoming.tar"
        self._size = 0
        self._file = -1
        self._none = False
        self.trees: dict[int, Path] = {}
        """Those that have come so far, by their steps."""

    def wanted(self, _step: int, /) -> bool:
        """Say whether the guest has to send the layer of a step: until it has none."""
        return not self._none

    def write(self, step: int, data: bytes, /) -> None:
        """Take the next bytes of a layer.

        Raises:
            InputError: there are more than the machine's drive can hold.
            MachineError: the disk is full.
        """
        self._size += len(data)
        if self._size > self._limit:
            raise InputError(
                f"the guest sent more than {counted(self._limit, 'byte')} as the layer of step {step}",
                hint="that is more than its drive can hold, which has machine.disk_size",
            )
        try:
            if self._file < 0:
                self._archive.parent.mkdir(mode=0o755, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
                self._file = os.open(self._archive, flags, 0o600)
            write_all(self._file, data)
        except OSError as error:
            raise MachineError(f"{self._archive} can't be written: {error.strerror}") from error

    def finished(self, step: int, /) -> None:
        """Unpack a layer that is complete, and hand it on.

        Raises:
            InputError: it is missing, though the guest has sent others.
            MachineError: it is damaged or beyond what a layer may be, or the disk is full.
        """
        if self._file < 0:
            if self.trees:  # what comes out would be an image without this step
                raise InputError(f"the guest sent layers of other steps, but none of step {step}")
            self._none = True
            return
        os.close(self._file)
        self._file, self._size = -1, 0
        unfinished = self._workspace.path / "layers" / "unfinished"
        directory = self._workspace.path / FINISHED / str(step)
        try:
            (unfinished / TREE).mkdir(parents=True)
            directory.parent.mkdir(exist_ok=True)
            report = self._workspace.trees().unpack_upper(self._archive, unfinished / TREE)
            notes = report.notes(f"step {step}")
            if notes:
                (unfinished / ALTERED).touch()
            self._archive.unlink()
            unfinished.rename(directory)
        except OSError as error:
            raise MachineError(f"{error.filename or unfinished}: {error.strerror}") from error
        except Interrupted:  # whoever waits for the end of the session tells of it
            raise MachineError(f"the layer of step {step} was not unpacked") from None
        for note in notes:
            self._notice(note)
        self.trees[step] = self._taken(step, directory) or directory / TREE


class VirtualMachine(Machine):
    """A `Machine` that boots the initramfs, works on drives, and whose guest sends the layers of its steps.

    Args:
        workspace: the build's directory.
        drives: all its drives.
        store: the directory of bases and images.
        compression: of the initramfs.
        kernel_args: what the user adds to the kernel's command line.
        kernel_modules: directories of the kernel's modules.
        notice: told what the user should know besides.
    """

    def __init__(
        self,
        workspace: BuildDirectory,
        drives: Drives,
        *,
        store: Path,
        compression: str,
        kernel_args: Sequence[str],
        kernel_modules: Sequence[Path],
        notice: Callable[[str], None],
    ) -> None:
        super().__init__(workspace)
        self._drives = drives
        self._home = store
        self._compression = Compression(compression)
        self._kernel_args = kernel_args
        self._kernel_modules = kernel_modules
        self._notice = notice
        self._initramfs = Path()

    def prepare(self, layers: Sequence[Layer], caches: Sequence[CacheMount] = ()) -> tuple[str, ...]:
        """Make the drives and the guest's initramfs; see `Machine.prepare`."""
        notes = self._drives.prepare(layers, caches)
        self._initramfs = initramfs_image(
            self._home, compression=self._compression, kernel_modules=self._kernel_modules
        )
        return notes

    def receiver(self, taken: Taken) -> LayerSink:
        """Return what takes the layers; see `Machine.receiver`."""
        return self._drives.receiver(taken)

    def tree(self) -> ArchiveLayer | None:
        """Fail: its guest has to send the layer of every step, whatever it said of their success."""
        raise MachineError(
            "the guest reported success, but did not send the layer of every step",
            hint="its vminit has to be of the same version as firebuild: have the initramfs built again",
        )

    def keep(self, into: Path) -> tuple[str, ...]:
        """Keep what finished steps have made, and the end of the console; see `Machine.keep`."""
        keep_console(self._console(), into)
        self._drives.keep(into)
        return ()

    @abstractmethod
    def _console(self) -> str:
        """Return the last that it wrote to its serial console, empty before it is started."""

    def _has_own_console(self) -> bool:
        """Tell whether the user sends what the kernel writes somewhere else."""
        return any(argument.startswith("console=") for argument in self._kernel_args)

    def _arguments(
        self,
        options: GuestOptions,
        network: StaticAddress | None,
        mmds: str,
        *platform: str,
        reboot: str = "t",
    ) -> str:
        """Return the kernel's command line; `platform` is what this kind of machine needs in it."""
        return kernel_arguments(
            reboot=reboot,
            network=network,
            scratch="/dev/vdb",
            caches=[cache.name for cache in self._drives.caches],
            mmds=f"http://{mmds}",
            mmds_timeout=options.mmds_timeout,
            connect_timeout=options.connect_timeout,
            extra=(*platform, *self._kernel_args),
        )


def no_instruction(remedy: str) -> str:
    """Say what an empty console means under KVM: every kernel that runs writes to it in its first second."""
    return (
        "its console is empty: the guest has not run one instruction. Most likely /dev/kvm opens here but"
        " runs no guest, as in a virtual machine without nested virtualisation (`kvm-ok` tells);"
        f" {remedy}"
    )
