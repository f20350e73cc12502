"""Whole sessions with a hostile peer: not only each message, but what comes after what."""

from __future__ import annotations

import io
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import Any, Final, cast

import grpc

from firebuild_bootstrap import messages, wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.errors import FirebuildError, InputError
from firebuild_bootstrap.events import StepInfo
from firebuild_bootstrap.guest import executor  # noqa: F401 - or a session of the guest would import it
from firebuild_bootstrap.guest.errors import GuestError, StepError
from firebuild_bootstrap.guest.handshake import NotNow
from firebuild_bootstrap.guest.stop import Stop
from firebuild_bootstrap.guest.stream import Checkpoint
from firebuild_bootstrap.guest.stream import Session as GuestSession
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.service.limits import Limits
from firebuild_bootstrap.service.session import BuildEnded, Session, StepEvents
from firebuild_bootstrap.service.stream import Stream
from fuzz.choices import Choices

MOUNTS: Final = (
    wire.BindMount(target="/a", resource="step-3-mount-1"),
    wire.SecretMount(resource="step-3-mount-2", env="TOKEN"),
    wire.SshMount(target="/s", id="default"),
)
COMMANDS: Final = (
    wire.CopyCommand(step=2, original="COPY f /", source="step-2", target="/"),
    wire.RunCommand(step=3, original="RUN x", argv=("x",), mounts=MOUNTS),
    wire.WorkdirCommand(step=4, original="WORKDIR /w", workdir="/w"),
)
RESOURCES: Final = ("step-2", "step-3-mount-1", "step-3-mount-2", "step-4", "")
SHELL: Final = wire.RunCommand(step=3, original="RUN x", argv=("/bin/sh",), attach=wire.Attach(), pauses=True)
SENT: Final[tuple[wire.AnyCommand, ...]] = (*COMMANDS, SHELL)
MOST_MESSAGES: Final = 60


def _archive() -> bytes:
    out = io.BytesIO()
    files = [(tar.Entry("d", tar.DIRECTORY, 0o755), b""), (tar.Entry("d/f", tar.FILE, 0o644, size=3), b"abc")]
    tar.write_layer(out, files)
    return out.getvalue()


ARCHIVE: Final = _archive()


class _File:
    def entries(self) -> Iterator[Entry]:
        yield Entry(
            source="f",
            path="f",
            kind=tar.FILE,
            mode=0o644,
            mtime_ns=0,
            size=7,
            open=lambda: io.BytesIO(b"content"),
        )


class _Agent:
    def answer(self, request: bytes, over: object) -> bytes:
        return b"\x05"


@dataclass
class _Layers:
    """Wants the layer of step 3, and takes no other."""

    taken: int = 0
    told: list[int] = field(default_factory=list)

    def wanted(self, step: int, /) -> bool:
        return step == 3

    def write(self, step: int, data: bytes, /) -> None:
        assert step == 3
        self.taken += len(data)

    def finished(self, step: int, /) -> None:
        self.told.append(step)


# --- a hostile guest ------------------------------------------------------------------------------


_SILENCE: Final = 0.2  # seconds; longer than a loaded machine takes for an answer, most times


def hostile_guest(data: bytes) -> None:
    """Serve a guest that says anything in any order.

    Whatever it says, steps end in their order, a layer is taken only where it is wanted, and the build
    succeeds only after each step has.
    """
    choices, layers = Choices(data), _Layers()
    session = Session(events=lambda _: None, limits=Limits(), on_guest_connected=lambda: None)
    infos = [StepInfo(number=one.step, line=one.step, instruction=one.original) for one in COMMANDS]
    stream = Stream(
        session,
        commands=COMMANDS,
        resources=dict.fromkeys(RESOURCES[:3], cast("Any", _File())),
        steps=StepEvents(session, infos, len(infos)),
        layers=layers,
        agents={"default": _Agent()},
    )
    said = queue.SimpleQueue[bytes | None]()
    guest = _Guest(choices, said)
    guest.speak("")
    with suppress(BuildEnded, FirebuildError):
        for told in stream.serve(_until_silent(said, session), cast("Any", None)):
            if (what := pb.ToGuest.FromString(told).WhichOneof("message")) not in ("apply", "group", "piece"):
                guest.speak(what or "")
    said.put(None)
    outcome = session.wait(10)
    assert outcome is not None
    assert layers.told == [one.step for one in COMMANDS][: len(layers.told)], layers.told
    if outcome.error is None:
        assert len(layers.told) == len(COMMANDS), outcome


def _until_silent(said: queue.SimpleQueue[bytes | None], session: Session) -> Iterator[bytes]:
    """Yield what is said; then the build ends, as it does some seconds later where times are supervised."""
    with suppress(queue.Empty):  # both wait for the other
        while (data := said.get(timeout=_SILENCE)) is not None:
            yield data
    session.fail(InputError("the fuzzer has nothing more to say"))


class _Guest:
    """Says what is due, or something else.

    Args:
        choices: what it does.
        said: takes its messages, and None for the end of its stream.
    """

    def __init__(self, choices: Choices, said: queue.SimpleQueue[bytes | None]) -> None:
        self._choices = choices
        self._said = said
        self._step = 1
        self._left = MOST_MESSAGES

    def speak(self, told: str) -> None:
        """Say what comes after it was `told` something; it ends where it has nothing to say."""
        for _ in range(self._choices.below(3)):
            self._say(self._anything())
        due = self._due(told)
        if due is not None and self._choices.below(8) != 1:
            self._say(due)
        elif self._choices.left and self._left > 0:
            self._say(pb.FromGuest(want=pb.Want(resource=self._choices.one(RESOURCES))))
        else:
            self._said.put(None)

    def _say(self, message: pb.FromGuest) -> None:
        self._left -= 1
        data = bytearray(message.SerializeToString())
        if data and self._choices.below(40) == 1:
            data[self._choices.below(len(data))] = self._choices.number()
        self._said.put(bytes(data))

    def _due(self, told: str) -> pb.FromGuest | None:
        match told:
            case "":
                return pb.FromGuest(hello=pb.Hello(version=messages.VERSION))
            case "run" | "workdir" | "files_end":
                self._step += 1
                return pb.FromGuest(done=pb.Done(step=self._step, duration_ms=1))
            case "checkpoint":
                return pb.FromGuest(layer=pb.Layer(data=b"x", last=True))
            case "finish":
                return pb.FromGuest(done=pb.Done())
        return None

    def _anything(self) -> pb.FromGuest:
        take = self._choices
        number = take.one((self._step, 0, 1, 2, 3, 4, 5, -1, 2**31 - 1))
        text = take.text(10).encode("utf-8", "replace").decode()
        failure = pb.Failure(error=text, exit_code=number, reason=text) if take.below(2) else None
        done = pb.Done(
            step=number, duration_ms=take.one((0, -1, 2**63 - 1)), failure=failure, exit_code=number
        )
        return take.one(
            (
                pb.FromGuest(output=pb.Output(data=take.bytes(), stderr=bool(take.below(2)))),
                pb.FromGuest(alive=pb.Alive()),
                pb.FromGuest(want=pb.Want(resource=take.one((*RESOURCES, text)))),
                pb.FromGuest(done=done),
                pb.FromGuest(failing=done),
                pb.FromGuest(layer=pb.Layer(data=take.bytes(), last=bool(take.below(2)))),
                pb.FromGuest(
                    agent_request=pb.AgentRequest(id=take.one(("default", text)), message=take.bytes())
                ),
                pb.FromGuest(hello=pb.Hello(version=number)),
                pb.FromGuest(input_taken=pb.InputTaken(bytes=number)),
                pb.FromGuest(begun=pb.Begun()),
                pb.FromGuest(identity=pb.IdentityState(number=number, csr=take.bytes(), error=text)),
                pb.FromGuest(probed=pb.Probed(exit_code=number, output=take.bytes())),
                pb.FromGuest(),
            )
        )


# --- a hostile server -----------------------------------------------------------------------------


def hostile_server(data: bytes) -> None:
    """Have our guest hear anything in any order; it does what is readable, and ends."""
    stop = Stop()
    try:
        with GuestSession(cast("grpc.Channel", _Channel(data)), stop, 60.0, 60.0, 60.0) as session:
            for step in session.steps():
                if isinstance(step, Checkpoint):
                    step.send(lambda out: out.write(b"layer"))
                elif isinstance(step, wire.CopyCommand):
                    _take(session, "")
                elif isinstance(step, wire.RunCommand):
                    for name in wire.mount_resources(step):
                        _take(session, name)
                    session.ask_agent("default", b"\x0b", lambda _: None)
                    if step.pauses:
                        session.instead(StepError("it failed", exit_code=1), 1.0)
                session.finished(getattr(step, "step", 0), 0, 0.5)
            session.success()
    except (GuestError, NotNow):
        pass
    finally:
        stop.close()


def _take(session: GuestSession, resource: str) -> None:
    with open(os.devnull, "wb") as target:
        for incoming in session.files(resource):
            assert not incoming.entry.path.startswith("/")
            assert ".." not in incoming.entry.path.split("/")
            if incoming.entry.kind == tar.FILE:
                with TemporaryFile() as file:
                    os.truncate(file.fileno(), min(incoming.entry.size, 1 << 20))
                    incoming.write(file.fileno())
        target.flush()


class _Channel:
    """A channel whose only call gives what the fuzzer has, and takes what it is given."""

    def __init__(self, data: bytes) -> None:
        self._choices = Choices(data)
        self._cancelled = False

    def stream_stream(self, _method: str) -> _Channel:
        return self

    def __call__(self, outgoing: Iterator[bytes]) -> _Channel:
        self._sender = threading.Thread(target=lambda: deque(outgoing, maxlen=0), daemon=True)
        self._sender.start()
        return self

    def cancel(self) -> None:
        self._cancelled = True

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(MOST_MESSAGES):
            if self._cancelled or not self._choices.left:
                return
            yield self._message()

    def _message(self) -> bytes:
        take = self._choices
        command: wire.AnyCommand = take.one(SENT)
        encoded = (
            lambda: messages.encode(command).SerializeToString(),
            lambda: messages.encode_piece(take.one((ARCHIVE, ARCHIVE[:512], ARCHIVE[512:], take.bytes()))),
            lambda: pb.ToGuest(files_end=pb.FilesEnd()).SerializeToString(),
            lambda: pb.ToGuest(checkpoint=pb.Checkpoint(step=take.below(6))).SerializeToString(),
            lambda: pb.ToGuest(finish=pb.Finish()).SerializeToString(),
            lambda: pb.ToGuest(group=pb.Group(keep_owner=bool(take.below(2)))).SerializeToString(),
            lambda: pb.ToGuest(
                agent_reply=pb.AgentReply(number=take.below(4), message=b"x")
            ).SerializeToString(),
            lambda: pb.ToGuest(
                input=pb.Input(data=take.bytes(), last=bool(take.below(2)))
            ).SerializeToString(),
            lambda: pb.ToGuest(signal=pb.Signal(number=take.number() - 128)).SerializeToString(),
            lambda: pb.ToGuest(
                window=pb.Window(rows=take.number(3), columns=take.number(3))
            ).SerializeToString(),
            lambda: pb.ToGuest(
                identity=pb.Identity(number=take.number(), chain=take.bytes().hex())
            ).SerializeToString(),
            lambda: pb.ToGuest(probe=pb.Probe(argv=["x", take.bytes().hex()])).SerializeToString(),
            take.bytes,
        )
        data = bytearray(take.one(cast("Sequence[Callable[[], bytes]]", encoded))())
        if data and take.below(20) == 1:
            data[take.below(len(data))] = take.number()
        return bytes(data)
