"""Where a Firecracker finds its files: where they are, or in its jail (docs/jailer.md of Firecracker)."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from firebuild_bootstrap.errors import MachineError
from firebuild_bootstrap.layers.tree import copy_file
from firebuild_bootstrap.machine.firecracker.settings import JailerSettings

# Inside a jail; Firecracker's default.
JAILED_SOCKET: Final = "/run/firecracker.socket"
_COPY: Final = (
    "--sparse=always",
    "--no-dereference",
    "--remove-destination",
    "--preserve=mode,ownership",
)
# The first release that logs every request, bodies included, unless it is told not to.
_TALKATIVE: Final = (1, 5)


class WorkDirectory(Protocol):
    """The files of one Firecracker."""

    def show(self, file: Path, name: str) -> str:
        """Let Firecracker read `file`, and return its path as Firecracker sees it.

        Raises:
            MachineError: the file can't be copied.
        """
        ...

    def share(self, file: Path, name: str) -> str:
        """Let Firecracker read `file`, which everybody may who gets there, as others do; see `show`."""
        ...

    def expose(self, drive: Path, name: str) -> str:
        """Let Firecracker write to `drive`, and return its path as Firecracker sees it; see `show`."""
        ...

    def take_back(self, drive: Path, name: str) -> None:
        """Have `drive` back once Firecracker has ended; nothing happens where it was not exposed.

        Raises:
            MachineError: it is not there any more, or can't be copied.
        """
        ...


class SharedDirectory:
    """A Firecracker that sees the files of this host, as this user."""

    def show(self, file: Path, name: str) -> str:  # noqa: ARG002
        """See `WorkDirectory.show`."""
        return str(file)

    def share(self, file: Path, name: str) -> str:  # noqa: ARG002
        """See `WorkDirectory.share`."""
        return str(file)

    def expose(self, drive: Path, name: str) -> str:  # noqa: ARG002
        """See `WorkDirectory.expose`."""
        return str(drive)

    def take_back(self, drive: Path, name: str) -> None:
        """See `WorkDirectory.take_back`."""


class Jail:
    """A Firecracker that sees one directory only.

    The directory can belong to Firecracker's user, who could have put links there: nothing follows one.

    Args:
        root: the directory.
        uid: the user that Firecracker runs as; None leaves the owners of files as they are.
        gid: its group.
    """

    def __init__(self, root: Path, uid: int | None, gid: int | None) -> None:
        self.root = root
        self._uid = -1 if uid is None else uid
        self._gid = -1 if gid is None else gid
        self._names: list[str] = []

    def show(self, file: Path, name: str) -> str:
        """See `WorkDirectory.show`. It is a copy: in a jail, the file would belong to Firecracker's user."""
        target = self.root / name
        try:
            with file.open("rb") as source, target.open("xb") as copy:
                self._names.append(name)
                copy_file(source.fileno(), copy.fileno())
                self._hand(copy.fileno(), 0o400)
        except OSError as error:
            raise _not_copied(file, target, error) from error
        return f"/{name}"

    def share(self, file: Path, name: str) -> str:
        """See `WorkDirectory.share`. On the same file system it becomes another name of the file."""
        try:
            os.link(file, self.root / name)
        except OSError:
            return self.show(file, name)
        self._names.append(name)
        return f"/{name}"

    def expose(self, drive: Path, name: str) -> str:
        """See `WorkDirectory.expose`."""
        target = self.root / name
        try:
            self._hand(drive, 0o600)
        except OSError as error:
            raise _not_copied(drive, target, error) from error
        _move(drive, target)
        self._names.append(name)
        return f"/{name}"

    def take_back(self, drive: Path, name: str) -> None:
        """See `WorkDirectory.take_back`."""
        exposed = self.root / name
        if name not in self._names:
            return
        try:
            is_file = stat.S_ISREG(exposed.lstat().st_mode)
        except OSError:
            is_file = False
        if not is_file:
            # Firecracker's user could have put a link there, to a file that is none of the guest's business.
            raise MachineError(f"{exposed}, the machine's drive, is gone")
        _move(exposed, drive)
        os.chown(drive, os.geteuid(), os.getegid(), follow_symlinks=False)
        self._names.remove(name)

    def clear(self) -> None:
        """Remove what is left of our files in a jail of another owner."""
        for name in self._names:
            (self.root / name).unlink(missing_ok=True)
        self._names.clear()

    def _hand(self, file: Path | int, mode: int) -> None:
        os.chmod(file, mode)
        os.chown(file, self._uid, self._gid)


def jail_directory(settings: JailerSettings, program: Path, machine_id: str) -> Path:
    """Return the directory that the jailer makes for a machine; its `root` is all that Firecracker sees."""
    return _chroot_base(settings) / program.name / machine_id


def firecracker_arguments(socket: str, version: tuple[int, int]) -> list[str]:
    """Return the arguments of Firecracker itself; `socket` is the path of the API as it sees it."""
    # Its log is on its standard output, between what the guest writes. Older ones log warnings only, and want
    # a file for it where a level is given.
    level = ["--level", "Warning"] if version >= _TALKATIVE else []
    return ["--api-sock", socket, *level]


def plain_command(
    program: Path, arguments: Sequence[str], machine_id: str, namespace: str
) -> list[str | Path]:
    """Return the command that starts Firecracker without a jail, in a network namespace if there is one."""
    entered: list[str | Path] = ["nsenter", f"--net={namespace}", "--"] if namespace else []
    return [*entered, program, "--id", machine_id, *arguments]


def jailer_command(
    settings: JailerSettings,
    programs: tuple[Path, Path],
    arguments: Sequence[str],
    machine_id: str,
    namespace: str,
) -> list[str | Path]:
    """Return the command that starts Firecracker in a jail; `programs` are the jailer and Firecracker."""
    jailer, program = programs
    command: list[str | Path] = [jailer, "--id", machine_id, "--exec-file", program]
    command += ["--uid", str(settings.uid), "--gid", str(settings.gid)]
    command += ["--chroot-base-dir", _chroot_base(settings)]
    if namespace:
        command += ["--netns", namespace]
    if settings.cgroups:
        command += ["--cgroup-version", str(settings.cgroup_version)]
        command += [word for limit in settings.cgroups for word in ("--cgroup", limit)]
    return [*command, "--", *arguments]


def _chroot_base(settings: JailerSettings) -> Path:
    # The jailer is started in another directory than this process.
    return Path(settings.chroot_base).expanduser().absolute()


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise _not_copied(source, target, error) from error
        # Another file system; holes stay holes.
        done = subprocess.run(
            ["cp", *_COPY, "--", source, target],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise MachineError(f"{source} can't be moved to {target}: {done.stderr.strip()}") from error
        source.unlink()


def _not_copied(source: Path, target: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{source} can't be brought to {target}: {error.strerror}",
        hint="the jail has to have room, and to be writable for the user of firebuild",
    )
