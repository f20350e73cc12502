"""The session with a guest of our own version: one stream, on which the host says what is to be done next.

Two threads serve it. One sends: a step, its files, and the next step when the guest has said that it is done.
The other reads, because a guest has to be heard while it is sent files: its output, its signs of life, and
that it gives up. Neither queues: gRPC takes a message from the one when the last has left, and lets the guest
send when the other has taken the last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import FirebuildError, InputError
from firebuild_bootstrap.events import Notice, StepProgress
from firebuild_bootstrap.image.layertrees import LayerSink
from firebuild_bootstrap.service.agents import Forwarding
from firebuild_bootstrap.service.console import Console, FailureShell
from firebuild_bootstrap.service.packing import packed
from firebuild_bootstrap.service.reporting import Outcome, aborted
from firebuild_bootstrap.service.session import Session, StepEvents
from firebuild_pki.display import counted

if TYPE_CHECKING:
    from firebuild_bootstrap.sshagent import SshAgent

_PROGRESS_SECONDS: Final = 0.5
# A piece of a layer is the largest that a guest sends, and has 1 MiB.
_MAX_MESSAGE: Final = wire.CHUNK_BYTES + 64 * 1024
# Of the same files in one step: a cache mount that somebody removes while it is filled is filled again.
_MOST_WANTS: Final = 10


class NoLayers:
    """Wants no layer of any step."""

    def wanted(self, _step: int, /) -> bool:
        """Say no."""
        return False

    def write(self, step: int, data: bytes, /) -> None:
        """Take nothing."""

    def finished(self, step: int, /) -> None:
        """Take no note."""


class Stream:
    """Serves the session of one build; what it raises ends the build.

    Args:
        session: the build.
        commands: what is to be done, in order.
        resources: by the names that the commands have for them.
        steps: takes the begin and end of steps.
        layers: takes their layers.
        agents: SSH agents of the user by id; a RUN reaches those that it mounts.
        console: of the command that has one, which is the last.
        shell: where a user gets a shell in the place of a RUN with `pauses` that has failed.
    """

    def __init__(
        self,
        session: Session,
        *,
        commands: Sequence[wire.AnyCommand],
        resources: Mapping[str, Resource],
        steps: StepEvents,
        layers: LayerSink,
        agents: Mapping[str, SshAgent],
        console: Console | None = None,
        shell: FailureShell | None = None,
    ) -> None:
        self._session = session
        self._shell = shell
        self._console = console
        self._commands = commands
        self._resources = resources
        self._steps = steps
        self._layers = layers
        self._agents = agents
        self._begun = threading.Lock()  # held forever by the one guest that there is

    def generic_handler(self) -> grpc.GenericRpcHandler:
        """Return the method for `grpc.Server.add_generic_rpc_handlers`."""
        handler: Any = grpc.stream_stream_rpc_method_handler(self.serve)
        return grpc.method_handlers_generic_handler(wire.SERVICE, {"Session": handler})

    def serve(self, requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield what the guest is told; gRPC asks for the next message when the last one has left.

        Raises:
            BuildEnded: the build has ended for another reason.
            FirebuildError: the guest sent what it must not, or a source can't be read.
        """
        if not self._begun.acquire(blocking=False):
            raise InputError("the guest began a second session")
        self._session.speaks("a session")
        guest = _Guest(requests, self._session, self._layers)
        with self._session.at_end(guest.wake), guest:
            if (yield from guest.answer("hello")).hello.version != messages.VERSION:
                raise InputError("the guest's vminit speaks another version of the session")
            for command in self._commands:
                done = yield from self._step(command, guest)
                if not self._succeeded(done, command.step):
                    return
                yield from self._layer(command.step, guest)
                # Only now: what is said to be finished is not lost, whoever is killed.
                self._steps.finished(command.step, 0, done.duration_ms / 1000)
            yield pb.ToGuest(finish=pb.Finish()).SerializeToString()
            if self._succeeded((yield from guest.answer("done")).done, 0):
                self._session.end(Outcome())

    def _step(self, command: wire.AnyCommand, guest: _Guest) -> Generator[bytes, None, pb.Done]:
        """Have one step done; return what the guest says of its end."""
        number = command.step
        self._steps.started(number)
        attached = isinstance(command, wire.RunCommand) and command.attach is not None
        console = self._console if attached else None
        if console is not None:
            console.begin(guest.notify)
        guest.works_on(number, self._forwarding(command, guest), console)
        yield messages.encode(command).SerializeToString()
        if isinstance(command, wire.CopyCommand):
            yield from self._files(number, self._resources[command.source], guest)
        left = dict.fromkeys(wire.mount_resources(command), _MOST_WANTS)
        pauses = isinstance(command, wire.RunCommand) and command.pauses and self._shell is not None
        due = ("done", "want", *(("failing",) if pauses else ()))
        while (said := (yield from guest.answer(*due))).HasField("want"):
            name = said.want.resource
            if name not in left:
                raise InputError(
                    f"the guest wants the files {name!r:.200}, which step {number} does not have"
                )
            left[name] -= 1
            if left[name] < 0:
                raise InputError(
                    f"the guest wants the files {name!r:.200} of step {number} more than {_MOST_WANTS} times"
                )
            yield from self._files(number, self._resources[name], guest)
        if isinstance(command, wire.RunCommand) and said.HasField("failing"):
            return (yield from self._shell_instead(command, said.failing, guest))
        if console is not None and not said.done.HasField("failure"):
            console.ended(number, said.done.exit_code)
        return said.done

    def _shell_instead(
        self, command: wire.RunCommand, failed: pb.Done, guest: _Guest
    ) -> Generator[bytes, None, pb.Done]:
        """Have a shell executed where a RUN has failed; return how that failed, whatever the shell does."""
        if not failed.HasField("failure") or self._shell is None:
            raise InputError(f"the guest says that step {command.step} is failing, and not why")
        failed.step = command.step
        status = failed.failure.exit_code or 1
        self._steps.finished(command.step, status, failed.duration_ms / 1000)
        why = f"step {command.step} failed: {failed.failure.error}"
        with (
            self._session.unlimited(),
            self._shell.opened(why, self._session.touch) as (console, attach),
            closing(console),
        ):
            console.begin(guest.notify)
            guest.has_shell(console)
            yield messages.encode(shell_of(command, attach)).SerializeToString()
            yield from guest.answer("done")
            guest.has_shell(None)
        return failed

    def _forwarding(self, command: wire.AnyCommand, guest: _Guest) -> Forwarding:
        mounts = command.mounts if isinstance(command, wire.RunCommand) else ()
        mounted = {mount.id for mount in mounts if isinstance(mount, wire.SshMount)}
        return Forwarding(
            {name: self._agents[name] for name in mounted},
            guest.notify,
            lambda message: self._session.events(Notice(level="warning", message=message)),
        )

    def _files(self, step: int, resource: Resource, guest: _Guest) -> Iterator[bytes]:
        sent, told = 0, time.monotonic()
        for message in packed(resource.entries()):
            if guest.has_answered:
                return  # it gives up
            self._session.touch()  # who takes a message is alive
            yield message
            sent += len(message)
            if time.monotonic() - told >= _PROGRESS_SECONDS:
                told = time.monotonic()
                self._session.events(StepProgress(step=step, bytes=sent))
        yield pb.ToGuest(files_end=pb.FilesEnd()).SerializeToString()

    def _succeeded(self, done: pb.Done, step: int) -> bool:
        """Whether a step, 0 for all of them, has succeeded; where it has failed, the build ends."""
        failure = done.failure if done.HasField("failure") else None
        if done.step != step and (done.step or failure is None):
            raise InputError(f"the guest says that step {done.step} is done, and works on step {step}")
        if failure is None:
            return True
        if done.step:
            self._steps.finished(step, failure.exit_code or 1, done.duration_ms / 1000)
        end = aborted(failure.error, step=done.step, exit_code=failure.exit_code, reason=failure.reason)
        self._session.end(end)
        return False

    def _layer(self, step: int, guest: _Guest) -> Iterator[bytes]:
        if self._layers.wanted(step):
            guest.sends_layer_of(step)
            yield pb.ToGuest(checkpoint=pb.Checkpoint(step=step)).SerializeToString()
            yield from guest.answer("layer")
        self._layers.finished(step)


def shell_of(command: wire.RunCommand, attach: wire.Attach) -> wire.RunCommand:
    """Return the shell that stands for a RUN: that which was to execute it, or else /bin/sh."""
    program, *rest = command.argv
    executes = command.script is None and len(rest) > 1 and rest[0].startswith("-")
    shell = program if executes and program.endswith("sh") else "/bin/sh"
    return replace(
        command,
        argv=(shell,),
        args={"TERM": "xterm", **command.args},
        script=None,
        mounts=(),  # the guest has them
        attach=attach,
        pauses=False,
    )


class _Guest:
    """What the guest says, read in a thread of its own while the block runs.

    What the sending thread has to know is handed over as one answer; a guest has only one at a time. What
    clients of a RUN ask SSH agents comes beside it, and so do the replies.
    """

    def __init__(self, requests: Iterator[bytes], session: Session, layers: LayerSink) -> None:
        self._requests = requests
        self._session = session
        self._layers = layers
        self._step = 0
        self._layer_of = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._answer: pb.FromGuest | None = None
        self._woken = False
        self._agents = Forwarding({}, self.notify, lambda _: None)
        self._console: Console | None = None
        self._thread = threading.Thread(target=self._read, name="firebuild-guest", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        """Leave the thread alone: it ends with the call, which ends after this."""
        self._agents.close()
        if self._console is not None:
            self._console.close()

    def works_on(self, step: int, agents: Forwarding, console: Console | None) -> None:
        """Take the output that comes for that of `step`, until it is done, and have its `agents` asked."""
        self._step = step
        self._agents = agents
        self._console = console

    def has_shell(self, console: Console | None) -> None:
        """Take the output that comes for that of a shell in the place of the step."""
        self._console = console

    def sends_layer_of(self, step: int) -> None:
        """Take the pieces of a layer that come for that of `step`."""
        self._layer_of = step

    @property
    def has_answered(self) -> bool:
        """Whether `answer` would return or raise at once."""
        return self._answer is not None or self._woken

    def wake(self) -> None:
        """Let `answer` look whether the build has ended."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def notify(self) -> None:
        """Let `answer` look for replies of agents, and for what the user says to the command."""
        with self._changed:
            self._changed.notify()

    def answer(self, *due: str) -> Generator[bytes, None, pb.FromGuest]:
        """Wait for what is due, and meanwhile yield the replies of SSH agents and what a console says.

        Raises:
            BuildEnded: the build has ended.
            FirebuildError: something else came, or the reading failed.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.has_answered or self._has_more)
                said, self._answer, self._woken = self._answer, None, False
            if self._error is not None:
                raise self._error
            self._session.touch()
            if said is not None:
                what = said.WhichOneof("message")
                if what not in due:
                    raise InputError(f"the guest sent {what}, where {' or '.join(due)} was due")
                return said
            yield from self._agents.replies()
            if self._console is not None:
                yield from self._console.messages()

    @property
    def _has_more(self) -> bool:
        console = self._console
        return self._agents.has_replies or (console is not None and console.has_messages)

    def _read(self) -> None:
        try:
            for data in self._requests:
                self._session.touch()
                self._take(data)
        except grpc.RpcError:
            pass  # it has gone, and so has its call
        except Exception as error:
            self._error = error
            self.wake()
            if isinstance(error, FirebuildError):
                self._session.fail(error)  # the other thread may wait for a guest that takes nothing
            return
        self._session.left()

    def _take(self, data: bytes) -> None:
        if len(data) > _MAX_MESSAGE:
            raise InputError(
                f"the guest sent a message of {counted(len(data), 'byte')}; {_MAX_MESSAGE} are allowed"
            )
        try:
            said = pb.FromGuest.FromString(data)
        except DecodeError:
            raise InputError("the guest sent bytes that are not a message of a session") from None
        match said.WhichOneof("message"):
            case "alive":
                pass
            case "output":
                self._output(said.output)
            case "layer":
                self._layer(said)
            case "agent_request":
                self._agents.ask(said.agent_request)
            case "input_taken" | "begun" | "identity" | "probed" if self._console is not None:
                self._console.said(said)
            case None:
                raise InputError("the guest sent a message that says nothing")
            case what:
                self._answered(what, said)

    def _answered(self, what: str, said: pb.FromGuest) -> None:
        if what == "done":
            self._agents.close()
        with self._changed:
            if self._answer is not None:
                raise InputError(f"the guest sent {what} before it was asked again")
            self._answer = said
            self._changed.notify()

    def _output(self, output: pb.Output) -> None:
        if (console := self._console) is not None and console.output is not None:
            console.output(output.data)
            return
        self._session.pass_on(self._step, "stderr" if output.stderr else "stdout", output.data)

    def _layer(self, said: pb.FromGuest) -> None:
        step = self._layer_of
        if not step:
            raise InputError("the guest sent a layer that it was not asked for")
        if said.layer.data:
            self._layers.write(step, said.layer.data)
        if said.layer.last:
            self._layer_of = 0
            self._answered("layer", said)
