"""What an ext4 file system says about itself while a machine has it mounted (kernel: ext4/super.rst)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from firebuild_bootstrap.errors import MachineError

_OFFSET: Final = 1024
_FIELDS: Final = struct.Struct("<44x I 4x H 2x H H 36x I")  # s_mtime, s_mnt_count, s_magic, s_state, incompat
_MAGIC: Final = 0xEF53
_CLEANLY_UNMOUNTED: Final = 0x0001
_NEEDS_RECOVERY: Final = 0x0004


@dataclass(frozen=True)
class Superblock:
    """The state of a file system.

    Args:
        mounts: how often it was mounted, and
        mounted_at: when last, by the clock of whoever mounted it.
        clean: nobody has it mounted for writing.
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
        """Whether nobody has mounted it between the two."""
        return (self.mounts, self.mounted_at) == (other.mounts, other.mounted_at)
