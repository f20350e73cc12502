"""A build with an old guest: the Go program `vminit`, as it runs in the field.

What such a guest does with files, users and variables differs from the Dockerfile reference in many ways
(docs/wire-protocol.md, "Old guests"). So it is only asked for what it does right: to put new files into a
directory of their own, and to run shell scripts. The scripts do the rest, and write marks among the output
that say what became of it.
"""

from __future__ import annotations

import binascii
import dataclasses
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.errors import FirebuildError, GuestLost, InputError, StepFailed
from firebuild_bootstrap.service.reporting import Outcome, failure, why
from firebuild_bootstrap.service.session import Session, StepEvents
from firebuild_pki.values import dataclass

from . import copying, scripts

# From its second ping on, whatever the metadata say.
_PING_SECONDS: Final = 5.0
_ARRIVED: Final = """begin
[ -f "$S/place" ] || die "the files did not arrive"
. "$S/place"
die "the files did not arrive"
"""


# The longest marks carry what `dd` reads at once, 64 KiB, in base64.
_MOST_HELD: Final = 1024 * 1024


Stream = Literal["stdout", "stderr"]

_TOO_OLD: Final = "the guest's vminit is too old to build this image"
_HINT: Final = "use a current vminit, or put what is missing into the base"
# The guest stops reading at such output, and what still writes is ended by SIGPIPE.
_STATUS: Final = re.compile("[0-9]{1,3}")
_CUT_OFF: Final = re.compile(r"UTF-8|broken pipe|\b141\b")
_NOT_UTF8: Final = (
    "an old vminit can't pass on output that is not UTF-8: put dd and base64 into the base, or let the step "
    "write it into a file"
)


@dataclasses.dataclass(eq=False)
class Shipment:
    """What one COPY or ADD sends, in portions that are asked for one after the other.

    `begun` and `sent` count the portions that were asked for, and those that were sent to their end.
    """

    placing: copying.Placing
    feed: copying.Feed
    portions: Sequence[Sequence[copying.Piece]]
    begun: int = 0
    sent: int = 0

    @property
    def step(self) -> int:
        """The number of the step."""
        return self.placing.command.step


class OldGuest:
    """Decides what an old guest is told; `progress` takes what it says.

    Args:
        commands: of the plan.
        resources: by the `source` of the command that asks for them.
        session: takes output and the end.
        events: takes the begin and end of steps.
    """

    def __init__(
        self,
        commands: Sequence[wire.AnyCommand],
        resources: Mapping[str, Resource],
        *,
        session: Session,
        events: StepEvents,
    ) -> None:
        self._nonce = secrets.token_hex(8)
        self._staging = f"/.firebuild-{self._nonce}"
        self._plan = tuple(commands)
        self._resources = resources
        self._session = session
        self._lock = threading.Lock()
        self._commands: Sequence[str] = ()
        self._shipments: dict[str, tuple[Shipment, int]] = {}
        self.progress = Progress(session, events, self._nonce, [command.step for command in commands])

    def close(self) -> None:
        """Let go of what is open."""
        for shipment, _ in self._shipments.values():
            shipment.feed.close()

    # --- commands -------------------------------------------------------------------------------

    def commands(self) -> Sequence[str]:
        """Return what the guest is to do; worked out when it asks for the first time.

        Raises:
            InputError: the build can't come out right with an old guest, or a source can't be read.
        """
        with self._lock:
            if not self._commands:
                self._session.pings_every(_PING_SECONDS)
                self.progress.told()
                self._commands = self._rewritten_plan()
        return self._commands

    def _rewritten_plan(self) -> list[str]:
        found = [self._script(0, "RUN firebuild: what the image has", scripts.probe(self._plan))]
        for command in self._plan:
            found += self._rewritten(command)
        # Old guests take messages up to nine tenths of what the protocol allows.
        if sum(map(len, map(str.encode, found))) > wire.MAX_CHUNK_BYTES - 64 * 1024:
            raise TooOld("the Dockerfile has too many steps for one message of the protocol")
        return found

    def _rewritten(self, command: wire.AnyCommand) -> Iterator[str]:
        match command:
            case wire.RunCommand():
                if command.mounts or command.network != "default":
                    raise TooOld("has --mount or --network, which it does not know", command.step)
                if command.script is None and "=" in command.argv[0]:
                    raise TooOld(f"runs {command.argv[0]!r}, whose name contains '='", command.step)
                yield self._script(command.step, command.original, scripts.run(command, self._staging))
            case wire.WorkdirCommand():
                yield self._script(command.step, f"RUN {command.original}", scripts.workdir(command))
            case wire.CopyCommand():
                shipment = _shipment(command, self._resources[command.source])
                for number in range(len(shipment.portions)):
                    name = f"{command.source}/{number + 1}"
                    self._shipments[name] = (shipment, number)
                    yield scripts.encode_command(
                        wire.CopyCommand(
                            step=command.step,
                            original=f"COPY {name} {self._staging}",
                            source=name,
                            target="/",
                        )
                    )
                yield self._script(command.step, f"RUN {command.original}", _ARRIVED)

    def _script(self, step: int, original: str, script: str) -> str:
        """Return a RUN for a script; old guests expand variables in the last argument, and only there."""
        text = scripts.library(nonce=self._nonce, staging=self._staging, step=step) + script
        if len(text.encode()) > scripts.MAX_SCRIPT_BYTES:
            raise TooOld(f"is longer than the {scripts.MAX_SCRIPT_BYTES} bytes that it can take", step)
        command = wire.RunCommand(step=step, original=original, argv=("/bin/sh", "-c", text, "firebuild"))
        return scripts.encode_command(command)

    # --- files ----------------------------------------------------------------------------------

    def chunks(self, path: str) -> Iterator[pb.ResourceChunk]:
        """Yield the messages of a portion.

        Raises:
            InputError: there is none of this name, it was asked for out of order, or it can't be read.
        """
        if not self._commands:
            raise InputError("the guest asked for files before it asked for commands")
        shipment, number = self._shipments.get(path, (None, 0))
        if shipment is None or shipment.begun != number:
            raise InputError(f"the guest asked for {path!r:.200}, which is not what comes next")
        shipment.begun += 1
        self.progress.fetching(shipment.step)
        for position, piece in enumerate(shipment.portions[number]):
            header = self._header(piece.path, f"{path}-{position}", directory=piece.entry < 0)
            content = () if piece.entry < 0 else shipment.feed.piece(piece.entry, piece.size, last=piece.last)
            yield from _messages(header, content)
        if number == len(shipment.portions) - 1:
            yield from self._instructions(shipment, path)
        shipment.sent += 1

    def lost(self, path: str) -> None:
        """End the build if a portion was not sent to its end: the guest would go on without the rest."""
        shipment, number = self._shipments.get(path, (None, 0))
        if shipment is not None and shipment.sent <= number:
            self._session.fail(
                GuestLost(f"the connection broke while the files of step {shipment.step} were sent")
            )

    def _instructions(self, shipment: Shipment, path: str) -> Iterator[pb.ResourceChunk]:
        texts = {
            "sums": shipment.placing.sums(shipment.feed.digests),
            "place": shipment.placing.script(),
        }
        for name, text in texts.items():
            yield from _messages(self._header(name, f"{path}-{name}", directory=False), _cut(text.encode()))

    def _header(self, path: str, identity: str, *, directory: bool) -> pb.ResourceChunk.ResourceHeader:
        # An old guest joins even an absolute target to the directory, and puts a file below the target
        # unless both base names are equal.
        place = f"{self._staging}/{path}".rstrip("/")
        return pb.ResourceChunk.ResourceHeader(
            sourcePath=place,
            targetPath=place,
            targetWorkdir="/",
            targetUser="0:0",
            fileMode=0o700 if directory else 0o600,
            isDir=directory,
            id=identity,
        )


def _shipment(command: wire.CopyCommand, resource: Resource) -> Shipment:
    entries = list(copying.plain(resource.entries()))
    batches = copying.batches(entries)
    files = copying.files(batches)
    pieces = [*copying.directories(batches), *(piece for file in files for piece in file.pieces)]
    return Shipment(
        copying.Placing(command, batches, files),
        copying.Feed(resource, entries),
        copying.portions(pieces),
    )


def _messages(
    header: pb.ResourceChunk.ResourceHeader, content: Iterable[bytes]
) -> Iterator[pb.ResourceChunk]:
    """Yield the messages of one entry: its header, its content with checksums, and its end."""
    yield pb.ResourceChunk(header=header)
    for data in content:
        yield pb.ResourceChunk(
            chunk=pb.ResourceChunk.ResourceContents(chunk=data, checksum=wire.checksum(data), id=header.id)
        )
    yield pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id=header.id))


def _cut(data: bytes) -> Iterator[bytes]:
    for offset in range(0, len(data), wire.CHUNK_BYTES):
        yield data[offset : offset + wire.CHUNK_BYTES]


class TooOld(InputError):
    """The Dockerfile is more than such a guest can execute; `step` is the number of the step, 0 for all."""

    def __init__(self, why: str, step: int = 0) -> None:
        what = f"step {step} " if step else ""
        super().__init__(
            f"the guest's vminit is too old for this Dockerfile: {what}{why}", hint="use a current vminit"
        )
        self.step = step


# --- marks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One mark: `B` a step began, `D` it wrote something (value: base64), `E` it ended (value: exit status),
    `X` it failed (value: why), `P` the image has what is needed. `ends_line` tells whether its line feed came
    along.
    """

    kind: str
    step: int
    value: str
    ends_line: bool


class MarkReader:
    """Separates marks from the output of one stream, also where a mark is cut in two.

    The streams do not run side by side; `step` is for who wants to remember how far this one has come.

    Args:
        nonce: what begins the marks of this build.
    """

    def __init__(self, nonce: str) -> None:
        self._begin = f"\x01{nonce}:"
        self._mark = re.compile(f"{self._begin}([A-Z]):([0-9]{{1,9}}):([^\x02]*)\x02(\n?)")
        self._held = ""
        self.step = 0

    def feed(self, text: str) -> Iterator[str | Mark]:
        """Yield output and marks in their order; what may be the begin of a mark is held back."""
        text, self._held = self._held + text, ""
        end = 0
        for found in self._mark.finditer(text):
            if found.start() > end:
                yield text[end : found.start()]
            yield Mark(found[1], int(found[2]), found[3], found[4] != "")
            end = found.end()
        rest = text[end:]
        self._held = rest[self._cut(rest) :]
        if output := rest[: len(rest) - len(self._held)]:
            yield output

    def _cut(self, text: str) -> int:
        begin = text.rfind("\x01")
        tail = text[begin:]
        whole = tail.startswith(self._begin) and "\x02" not in tail and len(tail) <= _MOST_HELD
        return begin if begin >= 0 and (whole or self._begin.startswith(tail)) else len(text)

    @property
    def holding(self) -> bool:
        """Whether the begin of a mark is held back."""
        return bool(self._held)

    def rest(self) -> str:
        """Return what was held back after all: it was not a mark."""
        held, self._held = self._held, ""
        return held


# --- what it is doing -----------------------------------------------------------------------------


class Progress:
    """The steps of one build with an old guest. Every method may be called from any thread.

    Args:
        session: takes output and the end.
        events: takes the begin and end of steps.
        nonce: what begins the marks.
        steps: the numbers of all steps.
    """

    def __init__(
        self,
        session: Session,
        events: StepEvents,
        nonce: str,
        steps: Iterable[int],
    ) -> None:
        self._session = session
        self._events = events
        self._marks: dict[Stream, MarkReader] = {
            "stdout": MarkReader(nonce),
            "stderr": MarkReader(nonce),
        }
        self._missing = list(steps)
        self._lock = threading.RLock()
        self._told = False
        self._ready = False
        self._trims = False
        self._step = 0
        self._begun = 0.0
        # Told late: what the step wrote to the other stream may still be on its way.
        self._ended: tuple[int, float] | None = None
        self._failure: Outcome | None = None

    def told(self) -> None:
        """The guest is told what to do."""
        self._told = True

    def output(self, stream: Stream, pieces: Sequence[str]) -> None:
        """Take what the guest read from one stream, piece by piece as it read it.

        Raises:
            BuildEnded: the build has ended.
            InputError: a mark says what can't be.
        """
        with self._lock:
            reader = self._marks[stream]
            for piece in pieces:
                self._session.touch()  # millions may come at once, each to be looked at with what is held
                parts = list(reader.feed(piece))
                for number, part in enumerate(parts, start=1):
                    if isinstance(part, Mark):
                        reader.step = self._events.known(part.step)
                        self._marked(stream, part)
                    else:
                        whole = number == len(parts) and not reader.holding
                        self._write(stream, part, whole=whole)

    def fetching(self, step: int) -> None:
        """The guest asks for files of a step."""
        with self._lock:
            self._begin(step)

    def success(self) -> None:
        """End a build whose guest says that all went well, which it may not know."""
        with self._lock:
            self._flush()
            if self._failure is None and self._missing:
                self._fail(self._incomplete())
            self._session.end(self._failure or Outcome())

    def abort(self, text: str) -> None:
        """End a build that the guest gave up with these words."""
        with self._lock:
            if self._failure is None:
                self._fail(self._guess(text))
            self._end_if_failed()

    # --- marks ----------------------------------------------------------------------------------

    def _marked(self, stream: Stream, mark: Mark) -> None:
        match mark.kind:
            case "D":
                self._session.pass_on(mark.step, stream, _decoded(mark.value))
            case "P":
                self._ready = True
                # Some old guests trim what they pass on: this one's line feed shows it.
                self._trims = not mark.ends_line
            case "B":
                self._begin(mark.step)
            case "X":
                self._fail(self._explained(mark))
            case "E":
                self._finish(mark)

    def _begin(self, step: int) -> None:
        """Note that a step began; each tells so several times, once on each stream."""
        if step in (0, self._step) or self._end_if_failed():
            return
        self._tell_end()
        self._step, self._begun = step, time.monotonic()
        self._events.started(step)

    def _finish(self, mark: Mark) -> None:
        code = int(mark.value) if _STATUS.fullmatch(mark.value) else 1
        if code:
            self._fail(StepFailed(f"the command exited with status {code}", step=mark.step, exit_code=code))
            return
        if mark.step in self._missing:
            self._missing.remove(mark.step)
        self._ended = (0, time.monotonic() - self._begun)

    def _explained(self, mark: Mark) -> FirebuildError:
        if mark.step == 0:
            return InputError(f"{_TOO_OLD}: {why(mark.value)}", hint=_HINT)
        return StepFailed(why(mark.value), step=mark.step)

    # --- the end --------------------------------------------------------------------------------

    def _fail(self, error: FirebuildError) -> None:
        if self._failure is not None:
            return
        self._failure = failure(error)
        if isinstance(error, StepFailed):
            self._ended = (error.exit_code or 1, time.monotonic() - self._begun)
            self._failure = Outcome(
                error=error,
                step=error.step,
                exit_code=error.exit_code,
                reason="file" if error.exit_code is None else "command",
            )

    def _end_if_failed(self) -> bool:
        """End a build whose guest goes on after a failure that it did not notice."""
        if self._failure is not None:
            self._flush()
            self._session.end(self._failure)
        return self._failure is not None

    def _incomplete(self) -> FirebuildError:
        step = min(self._missing)
        return StepFailed(f"the guest reported success, but step {step} was not seen to end", step=step)

    def _guess(self, text: str) -> FirebuildError:
        text = why(text)
        if self._told and not self._ready:
            return InputError(f"{_TOO_OLD}, which needs a shell in it, /bin/sh: {text}", hint=_HINT)
        return StepFailed(text, step=self._step, hint=_NOT_UTF8 if _CUT_OFF.search(text) else None)

    def _flush(self) -> None:
        for stream, reader in self._marks.items():
            if rest := reader.rest():
                self._write(stream, rest, whole=True)
        self._tell_end()

    def _tell_end(self) -> None:
        if self._ended is not None and self._step:
            self._events.finished(self._step, *self._ended)
        self._ended = None

    def _write(self, stream: Stream, text: str, *, whole: bool) -> None:
        if self._trims and whole and not text.endswith("\n"):
            text += "\n"
        self._session.pass_on(self._marks[stream].step, stream, text.encode())


def _decoded(value: str) -> bytes:
    """Return the output in a mark; line feeds among the base64 mean nothing."""
    try:
        return binascii.a2b_base64(value)
    except ValueError:
        return value.encode()
