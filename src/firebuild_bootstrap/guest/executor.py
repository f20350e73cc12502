"""Works through the commands of a build in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import Metadata, Root

from .classic import adapted
from .client import Client
from .copy import Copier
from .enter import Launcher
from .errors import GuestError, ProtocolError, StepError
from .idmap import check_mapped
from .incoming import incoming
from .output import Relay
from .overlay import Layers
from .provide import Provider, cleaning
from .run import run
from .stop import Stop
from .users import Users


def decode(texts: Sequence[str]) -> list[wire.AnyCommand]:
    """Read all commands before the first one runs; those of unknown instructions are left out.

    What an old server sends is put right (classic.py).

    Raises:
        ProtocolError: one is malformed; the message counts from 1.
    """
    commands: list[wire.AnyCommand] = []
    for number, text in enumerate(texts, 1):
        try:
            command = wire.decode_command(text)
        except wire.WireError as error:
            raise ProtocolError(f"command {number}: {error}") from error
        if command is not None:
            commands.append(command)
    return commands if extended(commands) else adapted(commands)


def extended(commands: Sequence[wire.AnyCommand]) -> bool:
    """Say whether the server knows the extensions: only such a one numbers its steps."""
    return any(command.step for command in commands)


class Executor:
    """Executes commands in one image.

    Args:
        root: the image.
        client: source of files.
        relay: takes output and the events of steps.
        stop: ends the running command.
        scratch: a directory that no RUN sees, for the files of mounts; empty for a hidden one in it.
        caches: directory of cache mounts; empty for such as last as long as the build.
        layers: keep apart what each command changes; None where the root is a plain directory.
        launcher: starts the helpers of RUNs.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        root: Root,
        client: Client,
        relay: Relay,
        stop: Stop,
        *,
        scratch: str = "",
        caches: str = "",
        layers: Layers | None = None,
        launcher: Launcher | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layers = layers
        self._launcher = launcher
        self._root = root
        self._client = client
        self._relay = relay
        self._stop = stop
        self._clock = clock
        self._users = Users(root)
        self._provider = Provider(root, client, stop, scratch=scratch, caches=caches)

    def execute(self, commands: Sequence[wire.AnyCommand]) -> None:
        """Execute all commands, up to the first that fails.

        Raises:
            GuestError: a command failed, with its step and exit code; or the guest was asked to end.
        """
        with cleaning(self._provider.close):
            self._execute(commands)

    def _execute(self, commands: Sequence[wire.AnyCommand]) -> None:
        for number, command in enumerate(commands, 1):
            self._stop.check()
            begun = self._clock()
            self._relay.started(command.step)
            try:
                self._explained(command, command.step or number)
            except GuestError as error:
                error.step = command.step
                if error is not self._stop.reason:
                    self._relay.finished(command.step, error.exit_code or 1, self._clock() - begun)
                raise
            self._relay.finished(command.step, 0, self._clock() - begun)

    def _explained(self, command: wire.AnyCommand, number: int) -> None:
        try:
            with self._layer(number):
                self._one(command)
        except OSError as error:
            raise StepError(f"{error.filename or 'the image'}: {error.strerror or error}") from error

    @contextmanager
    def _layer(self, number: int) -> Iterator[None]:
        if self._layers is None:
            yield
            return
        with self._layers.step(number):
            self._root.reopen()
            try:
                yield
            finally:
                self._root.close()  # or its file system could not be unmounted

    def _one(self, command: wire.AnyCommand) -> None:
        match command:
            case wire.RunCommand():
                self._run(command)
            case wire.CopyCommand():
                self._make_workdir(command, (0, 0))
                entries = incoming(self._client.resource(command.source))
                Copier(self._root, self._users, command).copy(entries)
            case wire.WorkdirCommand():
                identity = self._users.identity(command.user)
                check_mapped(f"USER {command.user}", identity.uid, identity.gid)
                self._make_workdir(command, (identity.uid, identity.gid))

    def _run(self, command: wire.RunCommand) -> None:
        identity = self._users.identity(command.user)
        self._make_workdir(command, (0, 0))

        def output(stream: str, data: bytes) -> None:
            self._relay.write(command.step, "stderr" if stream == "stderr" else "stdout", data)

        def say(text: str) -> None:
            output("stderr", f"firebuild: {text}\n".encode())

        with self._provider.provide(command, say) as provided:
            borrow = _ignore if self._layers is None else self._layers.borrow
            run(
                self._root,
                command,
                identity,
                self._stop,
                output,
                launcher=self._launcher,
                provided=provided,
                borrow=borrow,
            )

    def _make_workdir(self, command: wire.AnyCommand, owner: tuple[int, int]) -> None:
        path = wire.absolute("/", command.workdir)
        try:
            self._root.make_directory(path, Metadata(owner, 0o755), parents=owner)
        except OSError as error:
            raise StepError(f"WORKDIR {path}: {error.strerror or error}") from error


def _ignore(_path: str) -> None:
    """Take no note: without layers nothing is copied."""
