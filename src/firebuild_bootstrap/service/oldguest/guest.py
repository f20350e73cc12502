"""One build with an old guest: its commands instead of the plan's, and what they ask for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Resource, plain
from firebuild_bootstrap.errors import FirebuildError, GuestLost, InputError
from firebuild_bootstrap.service.oldguest import placing, running, shell, staging
from firebuild_bootstrap.service.oldguest.feed import Feed
from firebuild_bootstrap.service.oldguest.progress import Progress
from firebuild_bootstrap.service.resources import messages
from firebuild_bootstrap.service.session import Session
from firebuild_bootstrap.service.steps import StepEvents

# From its second ping on, whatever the metadata say.
_PING_SECONDS: Final = 5.0
_ARRIVED: Final = """begin
[ -f "$S/place" ] || die "the files did not arrive"
. "$S/place"
die "the files did not arrive"
"""


@dataclass(eq=False)
class Shipment:
    """What one COPY or ADD sends, in portions that are asked for one after the other.

    `begun` and `sent` count the portions that were asked for, and those that were sent to their end.
    """

    placing: placing.Placing
    feed: Feed
    portions: Sequence[Sequence[staging.Piece]]
    begun: int = 0
    sent: int = 0

    @property
    def step(self) -> int:
        """The number of the step."""
        return self.placing.command.step


class OldGuest:
    """Decides what an old guest is told; made when the first such guest asks for commands.

    Args:
        commands: of the plan.
        resources: by the `source` of the command that asks for them.
        session: takes output and the end.
        events: takes the begin and end of steps.

    Raises:
        InputError: the build can't come out right with an old guest, or a source can't be read.
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
        self._session = session
        session.pings_every(_PING_SECONDS)
        self._shipments: dict[str, tuple[Shipment, int]] = {}
        self.progress = Progress(session, events, self._nonce, [command.step for command in commands])
        self.commands = [self._script(0, "RUN firebuild: what the image has", running.probe(commands))]
        for command in commands:
            self.commands += self._rewritten(command, resources)
        # Old guests take messages up to nine tenths of what the protocol allows.
        if sum(map(len, map(str.encode, self.commands))) > wire.MAX_CHUNK_BYTES - 64 * 1024:
            raise _too_old("the Dockerfile has too many steps for one message of the protocol")

    def close(self) -> None:
        """Let go of what is open."""
        for shipment, _ in self._shipments.values():
            shipment.feed.close()

    # --- commands -------------------------------------------------------------------------------

    def _rewritten(self, command: wire.AnyCommand, resources: Mapping[str, Resource]) -> Iterator[str]:
        match command:
            case wire.RunCommand():
                if command.script is None and "=" in command.argv[0]:
                    raise _too_old(f"step {command.step} runs {command.argv[0]!r}, whose name contains '='")
                yield self._script(command.step, command.original, running.run(command, self._staging))
            case wire.WorkdirCommand():
                yield self._script(command.step, f"RUN {command.original}", running.workdir(command))
            case wire.CopyCommand():
                shipment = _shipment(command, resources[command.source])
                for number in range(len(shipment.portions)):
                    name = f"{command.source}/{number + 1}"
                    self._shipments[name] = (shipment, number)
                    yield wire.encode_command(
                        wire.CopyCommand(
                            step=command.step,
                            original=f"COPY {name} {self._staging}",
                            source=name,
                            target="/",
                        ),
                        extended=False,
                    )
                yield self._script(command.step, f"RUN {command.original}", _ARRIVED)

    def _script(self, step: int, original: str, script: str) -> str:
        """Return a RUN for a script; old guests expand variables in the last argument, and only there."""
        text = shell.library(nonce=self._nonce, staging=self._staging, step=step) + script
        if len(text.encode()) > shell.MAX_SCRIPT_BYTES:
            raise _too_old(f"step {step} is longer than the {shell.MAX_SCRIPT_BYTES} bytes that it can take")
        command = wire.RunCommand(step=step, original=original, argv=("/bin/sh", "-c", text, "firebuild"))
        return wire.encode_command(command, extended=False)

    # --- files ----------------------------------------------------------------------------------

    def chunks(self, path: str) -> Iterator[pb.ResourceChunk]:
        """Yield the messages of a portion.

        Raises:
            InputError: there is none of this name, it was asked for out of order, or it can't be read.
        """
        shipment, number = self._shipments.get(path, (None, 0))
        if shipment is None or shipment.begun != number:
            raise InputError(f"the guest asked for {path!r:.200}, which is not what comes next")
        shipment.begun += 1
        self.progress.fetching(shipment.step)
        for position, piece in enumerate(shipment.portions[number]):
            self._session.touch()
            header = self._header(piece.path, f"{path}-{position}", directory=piece.entry < 0)
            content = () if piece.entry < 0 else shipment.feed.piece(piece.entry, piece.size, last=piece.last)
            yield from messages(header, content)
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
            yield from messages(self._header(name, f"{path}-{name}", directory=False), _cut(text.encode()))

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
    entries = list(plain(resource.entries()))
    layers = staging.layers(entries)
    files = staging.files(layers)
    pieces = [*staging.directories(layers), *(piece for file in files for piece in file.pieces)]
    return Shipment(
        placing.Placing(command, layers, files),
        Feed(resource, entries),
        staging.portions(pieces),
    )


def _cut(data: bytes) -> Iterator[bytes]:
    for offset in range(0, len(data), wire.CHUNK_BYTES):
        yield data[offset : offset + wire.CHUNK_BYTES]


def _too_old(why: str) -> FirebuildError:
    return InputError(
        f"the guest's vminit is too old for this Dockerfile: {why}", hint="use a current vminit"
    )
