"""Where a Firecracker comes from, and where it finds its files.

It is started here, plainly or by the jailer, or was started elsewhere. Its files are where they are, or in
its jail (docs/jailer.md of Firecracker).
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.layers.tree import copy_file
from firebuild_bootstrap.machine.console import open_copy
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi, is_socket
from firebuild_bootstrap.machine.firecracker.checks import OLDEST, check_version
from firebuild_bootstrap.machine.firecracker.process import ForeignProcess, Process, StartedProcess
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings, JailerSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_pki.homes import absolute
from firebuild_pki.values import dataclass

_SOCKET: Final = "api.sock"
_STAT: Final = "firecracker.stat"
_NOT_STARTED: Final = "Not started"
SERIAL_LOG: Final = "machine.firecracker.serial_log"


class Source(ABC):
    """Where one machine's Firecracker comes from.

    Args:
        place: its files.
        version: its release.
    """

    is_silent = False
    """Whether its serial console can't be read here."""

    def __init__(self, place: WorkDirectory, version: tuple[int, int]) -> None:
        self.place = place
        self.version = version

    def prepare_place(self) -> WorkDirectory:
        """Make the place ready for files and return it.

        Raises:
            MachineError: it can't be made.
        """
        return self.place

    @abstractmethod
    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """Return the running Firecracker and its API.

        Args:
            namespace: path of the network namespace to run in; empty for this host's own.

        Raises:
            MachineError: it can't be started.
        """

    def clear(self) -> None:  # noqa: B027 - the workspace and the leftovers hold what most have
        """Remove files that are not on the list of leftovers. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A Firecracker to be started.

    Args:
        settings: the block `machine.firecracker`.
        path: its real path.
        version: its release.
        machine_id: letters, digits and hyphens.
        directory: the workspace; it is started there, so that the path of a socket in there is short.
        leftovers: gets the process.
    """

    settings: FirecrackerSettings
    path: Path
    version: tuple[int, int]
    machine_id: str
    directory: Path
    leftovers: Leftovers

    def start(self, command: list[str | Path]) -> StartedProcess:
        """Start it with `command`.

        Raises:
            MachineError: it can't be started.
        """
        stat_file = self.directory / _STAT
        self.leftovers.add_process(stat_file)
        log = open_copy(self.settings.serial_log, SERIAL_LOG)
        return StartedProcess(command, directory=self.directory, stat_file=stat_file, log=log)


class PlainSource(Source):
    """Firecracker as a program of this user.

    Args:
        program: what is started.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(WorkDirectory(), program.version)
        self._program = program

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """See `Source.launch`."""
        program = self._program
        arguments = firecracker_arguments(_SOCKET, self.version)
        process = program.start(plain_command(program.path, arguments, program.machine_id, namespace))
        return process, FirecrackerApi(program.directory / _SOCKET)


class JailedSource(Source):
    """Firecracker through the jailer.

    Args:
        program: what the jailer starts.
        jailer: the jailer's real path.
    """

    def __init__(self, program: Program, jailer: Path) -> None:
        block = program.settings.jailer
        self._home = jail_directory(block, program.path, program.machine_id)
        self._jail = Jail(self._home / "root", block.uid, block.gid)
        super().__init__(self._jail, program.version)
        self._program = program
        self._jailer = jailer
        self.socket = Path(f"{self._jail.root}{JAILED_SOCKET}")

    def prepare_place(self) -> WorkDirectory:
        """See `Source.prepare_place`."""
        program = self._program
        program.leftovers.add_directory(self._home)
        for group in _cgroups(program.settings.jailer, program.path.name, program.machine_id):
            program.leftovers.add_command(["rmdir", str(group)], quiet=True)
        try:
            self._jail.root.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise MachineError(
                f"the jail {self._jail.root} can't be made: {error.strerror}",
                hint="the jailer needs root; machine.firecracker.jailer.chroot_base says where jails are",
            ) from error
        return self._jail

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """See `Source.launch`."""
        program = self._program
        arguments = firecracker_arguments(JAILED_SOCKET, self.version)
        programs = (self._jailer, program.path)
        command = jailer_command(program.settings.jailer, programs, arguments, program.machine_id, namespace)
        return program.start(command), FirecrackerApi(self.socket)


class RunningSource(Source):
    """A Firecracker that was started elsewhere and is not configured.

    Args:
        settings: the block `machine.firecracker`; `running.socket` is set.
    """

    def __init__(self, settings: FirecrackerSettings) -> None:
        running = settings.running
        self.socket = absolute(running.socket or "")
        self._serial = None if running.serial is None else absolute(running.serial)
        self.is_silent = self._serial is None
        self._jail = None
        if running.root is not None:
            self._jail = Jail(absolute(running.root), running.uid, running.gid)
        super().__init__(self._jail or WorkDirectory(), OLDEST)

    def check(self) -> None:
        """Make sure that a Firecracker serves there that is still free.

        Raises:
            InputError: there is none, or it is configured already.
            ApiError: it does not answer.
        """
        where = f"machine.firecracker.running.socket: {self.socket}"
        if not is_socket(self.socket):
            raise InputError(f"{where}: there is no socket", hint="start Firecracker with --api-sock first")
        api = FirecrackerApi(self.socket)
        self.version = check_version(str(api.get("/version").get("firecracker_version", "")), where)
        state = api.get("/").get("state")
        if state != _NOT_STARTED:
            raise InputError(
                f"{where}: expected a Firecracker that has started no machine yet, its state is {state!r}",
                hint="start a fresh one for each build",
            )
        if self._jail is not None and not self._jail.root.is_dir():
            raise InputError(
                f"machine.firecracker.running.root: {self._jail.root} is not a directory",
                hint="name the jail's root as this host sees it, CHROOT_BASE/firecracker/ID/root",
            )

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:  # noqa: ARG002 - it is in its own
        """See `Source.launch`."""
        api = FirecrackerApi(self.socket)
        return ForeignProcess(api, self._serial), api

    def clear(self) -> None:
        """See `Source.clear`."""
        if self._jail is not None:
            self._jail.clear()


def _cgroups(settings: JailerSettings, program: str, machine_id: str) -> list[Path]:
    """Return the groups that the jailer makes and leaves behind."""
    if not settings.cgroups:
        return []
    top = Path("/sys/fs/cgroup")
    if settings.cgroup_version == 2:
        return [top / program / machine_id]
    controllers = sorted({limit.partition(".")[0] for limit in settings.cgroups})
    return [top / controller / program / machine_id for controller in controllers]


# --- the command that starts it -------------------------------------------------------------------

# Inside a jail; Firecracker's default.
JAILED_SOCKET: Final = "/run/firecracker.socket"
_MOVE_SECONDS: Final = 3600.0
_COPY: Final = (
    "--sparse=always",
    "--no-dereference",
    "--remove-destination",
    "--preserve=mode,ownership",
)
# The first release that logs every request, bodies included, unless it is told not to.
_TALKATIVE: Final = (1, 5)


class WorkDirectory:
    """The files of one Firecracker: where they are, as long as it sees those of this host, as this user."""

    def show(self, file: Path, name: str) -> str:  # noqa: ARG002
        """Let Firecracker read `file`, and return its path as Firecracker sees it.

        Raises:
            MachineError: the file can't be copied.
        """
        return str(file)

    def share(self, file: Path, name: str) -> str:
        """Let Firecracker read `file`, which everybody may who gets there, as others do; see `show`."""
        return self.show(file, name)

    def expose(self, drive: Path, name: str) -> str:
        """Let Firecracker write to `drive`, and return its path as Firecracker sees it; see `show`."""
        return self.show(drive, name)

    def take_back(self, drive: Path, name: str) -> None:
        """Have `drive` back once Firecracker has ended; nothing happens where it was not exposed.

        Raises:
            MachineError: it is not there any more, or can't be copied.
        """


class Jail(WorkDirectory):
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
    return absolute(settings.chroot_base)


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise _not_copied(source, target, error) from error
        # Another file system; holes stay holes.
        try:
            done = run_program(["cp", *_COPY, "--", source, target], seconds=_MOVE_SECONDS)
        except LimitExceeded as late:
            raise MachineError(f"{source} can't be moved to {target}: {late}") from late
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "replace").strip()
            raise MachineError(f"{source} can't be moved to {target}: {words}") from error
        source.unlink()


def _not_copied(source: Path, target: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{source} can't be brought to {target}: {error.strerror}",
        hint="the jail needs free space, and firebuild's user has to be able to write there",
    )
