"""Relays what RUN steps write, byte for byte and in order, in few calls and bounded memory."""

from __future__ import annotations

import codecs
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .client import Client, Stream
from .errors import GuestError
from .stop import Stop

BATCH_BYTES = 64 * 1024
_BATCH_SECONDS = 0.05
_QUEUED_PIECES = 16


@dataclass(frozen=True)
class _Piece:
    stream: Stream
    message: pb.LogMessage
    mergeable: bool = False


_END = _Piece("stdout", pb.LogMessage())


class Relay:
    """Sends output in the background; a full queue holds the writer back instead of losing bytes.

    Args:
        client: takes the messages.
        stop: is set when the server no longer takes them; its reason releases a waiting writer.
        extended: the server knows `data`, `step` and `event`; an old one gets lines of text.
        clock: monotonic seconds.
    """

    def __init__(
        self, client: Client, stop: Stop, *, extended: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._stop = stop
        self._extended = extended
        self._clock = clock
        self._queue: queue.Queue[_Piece] = queue.Queue(_QUEUED_PIECES)
        self._lines: dict[Stream, _Lines] = {"stdout": _Lines(), "stderr": _Lines()}
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        self._thread.start()

    def write(self, step: int, stream: Stream, data: bytes) -> None:
        """Pass on a piece of output (at most `BATCH_BYTES`); waits while the server is slow.

        Raises:
            GuestError: the guest was asked to end.
        """
        self._put(_Piece(stream, pb.LogMessage(data=data, step=step), mergeable=True))

    def started(self, step: int) -> None:
        """Report that a step began."""
        self._event(step, pb.StepEvent(kind=pb.StepEvent.STARTED))

    def finished(self, step: int, exit_code: int, seconds: float) -> None:
        """Report that a step ended, after all of its output."""
        event = pb.StepEvent(
            kind=pb.StepEvent.FINISHED, exit_code=exit_code, duration_ms=round(seconds * 1000)
        )
        self._event(step, event)

    def _event(self, step: int, event: pb.StepEvent) -> None:
        self._put(_Piece("stdout", pb.LogMessage(step=step, event=event)))

    def _put(self, piece: _Piece) -> None:
        while True:
            self._stop.check()
            try:
                return self._queue.put(piece, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """Wait until the server has taken everything, or the guest is asked to end."""
        while self._thread.is_alive() and not self._stop.reason:
            with suppress(queue.Full):
                self._queue.put(_END, timeout=0.1)
                break
        while self._thread.is_alive() and not self._stop.reason:
            self._thread.join(0.1)

    def _run(self) -> None:
        try:
            for piece in self._batches():
                for stream, message in self._messages(piece):
                    self._client.log(stream, message)
        except GuestError as error:
            self._stop.set(error)

    def _batches(self) -> Iterator[_Piece]:
        """Yield what is queued, neighbours of one stream merged up to a batch's size and age."""
        held: _Piece | None = None
        while (piece := held or self._queue.get()) is not _END:
            held = None
            parts, size = [piece.message.data], len(piece.message.data)
            until = self._clock() + _BATCH_SECONDS
            while piece.mergeable and size < BATCH_BYTES and (held := self._next(until)):
                size += len(held.message.data)
                if not _same_output(piece, held) or size > BATCH_BYTES:
                    break
                parts.append(held.message.data)
                held = None
            if len(parts) > 1:
                piece.message.data = b"".join(parts)
            yield piece

    def _next(self, until: float) -> _Piece | None:
        try:
            return self._queue.get(timeout=max(until - self._clock(), 0.001))
        except queue.Empty:
            return None

    def _messages(self, piece: _Piece) -> Iterator[tuple[Stream, pb.LogMessage]]:
        if self._extended:
            yield piece.stream, piece.message
        elif piece.mergeable:
            if lines := self._lines[piece.stream].feed(piece.message.data):
                yield piece.stream, pb.LogMessage(line=lines)
        else:
            for stream, text in self._lines.items():
                if lines := text.flush():
                    yield stream, pb.LogMessage(line=lines)


def _same_output(piece: _Piece, other: _Piece) -> bool:
    ours, theirs = (piece.stream, piece.message.step), (other.stream, other.message.step)
    return other.mergeable and ours == theirs


class _Lines:
    """Turns bytes into whole lines of text; what is not UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        if len(self._rest) > BATCH_BYTES:
            lines, self._rest = [*lines, self._rest], ""
        return lines

    def flush(self) -> list[str]:
        rest = self._rest + self._decoder.decode(b"", final=True)
        self._rest = ""
        self._decoder.reset()
        return [rest] if rest else []
