"""Works through the steps of a build in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from firebuild_bootstrap import wire
from firebuild_bootstrap.layers.root import Metadata, Root
from firebuild_bootstrap.layers.tar import LayerError, Sink

from .agents import Reply
from .attached import Control
from .copy import Copier, Incoming
from .enter import Launcher
from .errors import GuestError, StepError
from .overlay import Layers
from .provide import Provider, cleaning, lay_on
from .run import run
from .stop import Stop
from .stream import Checkpoint, Stream
from .users import Identity, Users, check_mapped

if TYPE_CHECKING:
    from .identity import Channel
    from .mounts import MountPoint


class Host(Protocol):
    """The other end: what it wants done, and what becomes of it. Each way to talk to a server is one."""

    def steps(self) -> Iterator[wire.AnyCommand | Checkpoint]:
        """Yield the steps in order, each when the one before it has ended; and wishes for their layers.

        Raises:
            GuestError: the server sent something else, or is lost.
        """
        ...

    def files(self, resource: str) -> Iterator[Incoming]:
        """Yield the files of a COPY or a mount; the content of one before the next is asked for.

        Raises:
            GuestError: they did not come whole.
        """
        ...

    def ask_agent(self, identifier: str, request: bytes, reply: Reply, /) -> None:
        """Have one of the user's SSH agents asked, and `reply` called with what it says, if it does.

        Raises:
            GuestError: the server is lost.
        """
        ...

    def control(self) -> Control:
        """Return what the host says to the command with `attach` that was yielded last.

        Raises:
            GuestError: there is none.
        """
        ...

    def identity(self) -> Channel:
        """Return what the host says about the identity of that command's machine."""
        ...

    def instead(self, error: StepError, seconds: float, /) -> wire.RunCommand:
        """Tell of a RUN with `pauses` that it has failed; return what is executed in its place.

        Raises:
            GuestError: the server sent something else, or is lost.
        """
        ...

    def started(self, step: int, /) -> None:
        """Take note that a step began."""
        ...

    def write(self, step: int, stream: Stream, data: bytes, /) -> None:
        """Take a piece of a step's output, at most `run.BATCH_BYTES`; wait while the server is slow."""
        ...

    def finished(self, step: int, exit_code: int, seconds: float) -> None:
        """Take note that a step ended, after all of its output."""
        ...


class Executor:
    """Executes what the server wants in one image.

    Args:
        root: the image.
        host: source of steps and files; takes output and the events of steps.
        stop: ends the running command.
        scratch: a directory that no RUN sees, for the files of mounts; empty for a hidden one in it.
        caches: directory of cache mounts; empty for such as last as long as the build.
        layers: keep apart what each command changes; None where the root is a plain directory.
        launcher: starts the helpers of RUNs.
        configure: makes the image that of this machine, before a command with `attach`; returns notes.
        document: the metadata, as they were at the guest's start.
        metadata: reads them again.
    """

    def __init__(
        self,
        root: Root,
        host: Host,
        stop: Stop,
        *,
        scratch: str = "",
        caches: str = "",
        layers: Layers | None = None,
        launcher: Launcher | None = None,
        configure: Callable[[], Iterable[str]] = tuple,
        document: Mapping[str, Any] | None = None,
        metadata: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._layers = layers
        self._launcher = launcher
        self._configure = configure
        self._document = document or {}
        self._metadata = metadata
        self._root = root
        self._host = host
        self._stop = stop
        self._users = Users(root)
        self._provider = Provider(root, host.files, host.ask_agent, stop, scratch=scratch, caches=caches)

    def execute(self) -> None:
        """Execute all steps, up to the first that fails.

        Raises:
            GuestError: a command failed, with its step and exit code; or the guest was asked to end.
        """
        with cleaning(self._provider.close):
            self._execute()

    def _execute(self) -> None:
        notice = self._layers.notice if self._layers is not None else ""
        for number, command in enumerate(self._host.steps(), 1):
            self._stop.check()
            if isinstance(command, Checkpoint):
                self._give_layer(command)
                continue
            begun = time.monotonic()
            self._host.started(command.step)
            if notice:
                self._say(command, notice)
                notice = ""
            try:
                self._explained(command, command.step or number)
            except GuestError as error:
                error.step = command.step
                if error is not self._stop.reason:
                    self._host.finished(command.step, error.exit_code or 1, time.monotonic() - begun)
                raise
            self._host.finished(command.step, 0, time.monotonic() - begun)

    def _give_layer(self, wish: Checkpoint) -> None:
        def write(out: Sink) -> None:
            # A guest that keeps none sends none, not even an empty one: its machine has a drive to be read.
            if self._layers is not None:
                self._layers.write(wish.step, out)

        try:
            wish.send(write)
        except (OSError, LayerError) as error:
            raise StepError(
                f"the layer of step {wish.step} can't be sent: {getattr(error, 'strerror', '') or error}"
            ) from error

    def _explained(self, command: wire.AnyCommand, number: int) -> None:
        try:
            with self._layer(command, number) as root:
                self._one(command, root)
        except OSError as error:
            raise StepError(f"{error.filename or 'the image'}: {error.strerror or error}") from error
        except LayerError as error:
            raise StepError(": ".join(filter(None, (error.message, error.hint)))) from error

    @contextmanager
    def _layer(self, command: wire.AnyCommand, number: int) -> Iterator[Root]:
        """Yield what a command works on: the image, or an empty tree that lies on it afterwards."""
        linked = isinstance(command, wire.CopyCommand) and command.link
        if self._layers is None and linked:
            with self._provider.directory() as path:
                with Root(path) as apart:
                    yield apart
                lay_on(path, self._root.path)
        elif self._layers is None:
            yield self._root
        else:
            with self._layers.step(number, linked=linked) as path:
                if linked:
                    with Root(path) as apart:
                        yield apart
                    return
                self._root.reopen()
                try:
                    yield self._root
                finally:
                    self._root.close()  # or its file system could not be unmounted

    def _one(self, command: wire.AnyCommand, root: Root) -> None:
        match command:
            case wire.RunCommand():
                self._run(command)
            case wire.CopyCommand(link=True):
                Copier(root, Users(root), command).copy(self._host.files(command.source))
            case wire.CopyCommand():
                self._make_workdir(command, (0, 0))
                kept = self._layers.kept if self._layers is not None else None
                Copier(root, self._users, command, kept).copy(self._host.files(command.source))
            case wire.WorkdirCommand():
                owner = self._users.workdir_owner(command.user)
                check_mapped(f"USER {command.user}", *owner)
                self._make_workdir(command, owner)

    def _run(self, command: wire.RunCommand) -> None:
        identity = self._users.identity(command.user)
        for path in command.attach.volumes if command.attach is not None else ():
            with suppress(OSError):  # what is there instead is the image's affair
                self._root.make_directory(wire.absolute("/", path), Metadata((0, 0)), parents=(0, 0))
        self._make_workdir(command, (0, 0))

        def output(stream: Stream, data: bytes) -> None:
            self._host.write(command.step, stream, data)

        def configure() -> None:
            for text in self._configure() if command.attach is not None else ():
                self._say(command, text)

        def execute(command: wire.RunCommand, control: Control | None) -> int:
            borrow = _ignore if self._layers is None else self._layers.borrow
            return run(
                self._root,
                command,
                identity,
                self._stop,
                output,
                launcher=self._launcher,
                provided=provided,
                borrow=borrow,
                control=control,
                configure=configure,
            )

        control = self._host.control() if command.attach is not None else None
        begun = time.monotonic()
        with ExitStack() as stack:
            provide = self._provider.provide(command, lambda text: self._say(command, text))
            provided = stack.enter_context(provide)
            if command.attach is not None and command.attach.identity is not None:
                files = self._identity_files(command.attach.identity, identity, stack)
                provided = replace(provided, hidden=self._provider.hidden, mounts=(*provided.mounts, files))
            try:
                status = execute(command, control)
            except StepError as error:
                if command.pauses:
                    other = self._host.instead(error, time.monotonic() - begun)
                    with self._told(command):
                        execute(other, self._host.control())
                raise
        if control is not None:
            control.status = status

    def _identity_files(self, wanted: wire.IdentityFiles, user: Identity, stack: ExitStack) -> MountPoint:
        from .identity import Files, Renewal, identity_files

        owner = self._users.owner(wanted.owner, "--identity-owner") if wanted.owner else (user.uid, user.gid)
        check_mapped(f"--identity-owner {wanted.owner}", *owner)

        def begin(files: Files) -> Renewal:
            renewal = Renewal(
                wanted,
                files,
                self._host.identity(),
                self._stop,
                metadata=self._metadata,
            )
            renewal.begin(self._document)
            return renewal

        directory = stack.enter_context(self._provider.directory())
        return stack.enter_context(identity_files(wanted, directory, owner, begin))

    @contextmanager
    def _told(self, command: wire.RunCommand) -> Iterator[None]:
        """Tell why what was to be executed instead could not be: the failure before it is what counts."""
        try:
            yield
        except StepError as error:
            self._say(command, error.message)

    def _say(self, command: wire.AnyCommand, text: str) -> None:
        self._host.write(command.step, "stderr", f"firebuild: {text}\n".encode())

    def _make_workdir(self, command: wire.AnyCommand, owner: tuple[int, int]) -> None:
        path = wire.absolute("/", command.workdir)
        try:
            self._root.make_directory(path, Metadata(owner), parents=owner)
        except OSError as error:
            raise StepError(f"WORKDIR {path}: {error.strerror or error}") from error


def _ignore(_path: str) -> None:
    """Take no note: without layers nothing is copied."""
