"""Where a Firecracker comes from: started here, plainly or by the jailer, or started elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

from firebuild_bootstrap.errors import InputError, MachineError
from firebuild_bootstrap.machine.console import open_copy
from firebuild_bootstrap.machine.firecracker.api import FirecrackerApi, is_socket
from firebuild_bootstrap.machine.firecracker.checks import OLDEST, check_version
from firebuild_bootstrap.machine.firecracker.chroot import (
    JAILED_SOCKET,
    Jail,
    SharedDirectory,
    WorkDirectory,
    firecracker_arguments,
    jail_directory,
    jailer_command,
    plain_command,
)
from firebuild_bootstrap.machine.firecracker.process import ForeignProcess, Process, StartedProcess
from firebuild_bootstrap.machine.firecracker.settings import FirecrackerSettings, JailerSettings
from firebuild_bootstrap.machine.leftovers import Leftovers
from firebuild_bootstrap.values import dataclass

_SOCKET: Final = "api.sock"
_STAT: Final = "firecracker.stat"
_NOT_STARTED: Final = "Not started"
SERIAL_LOG: Final = "machine.firecracker.serial_log"


class Source(Protocol):
    """Where one machine's Firecracker comes from."""

    @property
    def place(self) -> WorkDirectory:
        """Its files."""
        ...

    @property
    def is_silent(self) -> bool:
        """Whether its serial console can't be read here."""
        ...

    @property
    def version(self) -> tuple[int, int]:
        """Its release."""
        ...

    def prepare_place(self) -> WorkDirectory:
        """Make the place ready for files and return it.

        Raises:
            MachineError: it can't be made.
        """
        ...

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """Return the running Firecracker and its API.

        Args:
            namespace: path of the network namespace to run in; empty for this host's own.

        Raises:
            MachineError: it can't be started.
        """
        ...

    def clear(self) -> None:
        """Remove files that are not on the list of leftovers. Idempotent."""
        ...


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


class PlainSource:
    """Firecracker as a program of this user.

    Args:
        program: what is started.
    """

    is_silent = False

    def __init__(self, program: Program) -> None:
        self._program = program
        self.version = program.version
        self.place: WorkDirectory = SharedDirectory()

    def prepare_place(self) -> WorkDirectory:
        """See `Source.prepare_place`."""
        return self.place

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """See `Source.launch`."""
        program = self._program
        arguments = firecracker_arguments(_SOCKET, self.version)
        process = program.start(plain_command(program.path, arguments, program.machine_id, namespace))
        return process, FirecrackerApi(program.directory / _SOCKET)

    def clear(self) -> None:
        """See `Source.clear`: the workspace holds everything."""


class JailedSource:
    """Firecracker through the jailer.

    Args:
        program: what the jailer starts.
        jailer: the jailer's real path.
    """

    is_silent = False

    def __init__(self, program: Program, jailer: Path) -> None:
        self._program = program
        self._jailer = jailer
        self.version = program.version
        block = program.settings.jailer
        self._home = jail_directory(block, program.path, program.machine_id)
        self._jail = Jail(self._home / "root", block.uid, block.gid)
        self.socket = Path(f"{self._jail.root}{JAILED_SOCKET}")

    @property
    def place(self) -> WorkDirectory:
        """See `Source.place`."""
        return self._jail

    def prepare_place(self) -> WorkDirectory:
        """See `Source.prepare_place`."""
        program = self._program
        program.leftovers.add_directory(self._home)
        for group in _cgroups(program.settings.jailer, program.path.name, program.machine_id):
            program.leftovers.add_command(["rmdir", str(group)], quiet=True)
        try:
            self._jail.root.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise MachineError(f"the jail {self._jail.root} can't be made: {error.strerror}") from error
        return self._jail

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:
        """See `Source.launch`."""
        program = self._program
        arguments = firecracker_arguments(JAILED_SOCKET, self.version)
        programs = (self._jailer, program.path)
        command = jailer_command(program.settings.jailer, programs, arguments, program.machine_id, namespace)
        return program.start(command), FirecrackerApi(self.socket)

    def clear(self) -> None:
        """See `Source.clear`: the whole jail is on the list of leftovers."""


class RunningSource:
    """A Firecracker that was started elsewhere and is not configured.

    Args:
        settings: the block `machine.firecracker`; `running.socket` is set.
    """

    def __init__(self, settings: FirecrackerSettings) -> None:
        running = settings.running
        self._socket = Path(running.socket or "").expanduser().absolute()
        self._serial = None if running.serial is None else Path(running.serial).expanduser()
        self._jail = None
        self.version = OLDEST
        if running.root is not None:
            self._jail = Jail(Path(running.root).expanduser().absolute(), running.uid, running.gid)

    @property
    def place(self) -> WorkDirectory:
        """See `Source.place`."""
        return self._jail or SharedDirectory()

    @property
    def is_silent(self) -> bool:
        """See `Source.is_silent`."""
        return self._serial is None

    def check(self) -> None:
        """Make sure that a Firecracker serves there that is still free.

        Raises:
            InputError: there is none, or it is configured already.
            ApiError: it does not answer.
        """
        where = f"machine.firecracker.running.socket: {self._socket}"
        if not is_socket(self._socket):
            raise InputError(f"{where}: there is no socket", hint="start Firecracker with --api-sock first")
        api = FirecrackerApi(self._socket)
        self.version = check_version(str(api.get("/version").get("firecracker_version", "")), where)
        state = api.get("/").get("state")
        if state != _NOT_STARTED:
            raise InputError(
                f"{where}: expected a Firecracker that has started no machine yet, its state is {state!r}",
                hint="start a fresh one for each build",
            )
        if self._jail is not None and not self._jail.root.is_dir():
            raise InputError(f"machine.firecracker.running.root: {self._jail.root} is not a directory")

    def prepare_place(self) -> WorkDirectory:
        """See `Source.prepare_place`."""
        return self.place

    def launch(self, namespace: str) -> tuple[Process, FirecrackerApi]:  # noqa: ARG002 - it is in its own
        """See `Source.launch`."""
        api = FirecrackerApi(self._socket)
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
