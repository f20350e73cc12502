"""What an old guest is doing, worked out from what it asks for and what it passes on."""

from __future__ import annotations

import binascii
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from firebuild_bootstrap.errors import FirebuildError, InputError, StepFailed
from firebuild_bootstrap.service.oldguest.marks import Mark, MarkReader
from firebuild_bootstrap.service.outcome import Ending, Outcome, failure
from firebuild_bootstrap.service.session import Session
from firebuild_bootstrap.service.steps import StepEvents

Stream = Literal["stdout", "stderr"]

_TOO_OLD: Final = "the guest's vminit is too old to build this image"
_HINT: Final = "use a current vminit, or put what is missing into the base"
# The guest stops reading at such output, and what still writes is ended by SIGPIPE.
_CUT_OFF: Final = re.compile(r"UTF-8|broken pipe|\b141\b")
_NOT_UTF8: Final = (
    "an old vminit can't pass on output that is not UTF-8: put dd and base64 into the base, or let the step "
    "write it into a file"
)


@dataclass
class _Channel:
    """One stream of output, and the step that it has come to: the two do not run side by side."""

    marks: MarkReader
    step: int = 0


class Progress:
    """The steps of one build with an old guest. Every method may be called from any thread.

    Args:
        session: takes output and the end.
        events: takes the begin and end of steps.
        nonce: what begins the marks.
        steps: the numbers of all steps.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        session: Session,
        events: StepEvents,
        nonce: str,
        steps: Iterable[int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._events = events
        self._channels: dict[Stream, _Channel] = {
            "stdout": _Channel(MarkReader(nonce)),
            "stderr": _Channel(MarkReader(nonce)),
        }
        self._missing = list(steps)
        self._clock = clock
        self._lock = threading.RLock()
        self._ready = False
        self._trims = False
        self._step = 0
        self._begun = 0.0
        # Told late: what the step wrote to the other stream may still be on its way.
        self._ended: tuple[int, float] | None = None
        self._failure: Outcome | None = None

    def output(self, stream: Stream, pieces: Sequence[str]) -> None:
        """Take what the guest read from one stream, piece by piece as it read it."""
        with self._lock:
            channel = self._channels[stream]
            for piece in pieces:
                parts = list(channel.marks.feed(piece))
                for number, part in enumerate(parts, start=1):
                    if isinstance(part, Mark):
                        channel.step = self._events.known(part.step)
                        self._marked(stream, part)
                    else:
                        whole = number == len(parts) and not channel.marks.holding
                        self._write(stream, part, whole=whole)

    def fetching(self, step: int) -> None:
        """The guest asks for files of a step."""
        with self._lock:
            self._begin(step)

    def success(self) -> Outcome:
        """Return the end of a build whose guest says that all went well, which it may not know."""
        with self._lock:
            self._flush()
            if self._failure is None and (self._missing or not self._ready):
                self._fail(self._incomplete())
            return self._failure or Outcome(ending=Ending.SUCCESS)

    def abort(self, text: str) -> Outcome:
        """Return the end of a build that the guest gave up with these words."""
        with self._lock:
            if self._failure is None:
                self._fail(self._guess(text))
            self._flush()
            return self._failure or Outcome(ending=Ending.ABORTED)

    # --- marks ----------------------------------------------------------------------------------

    def _marked(self, stream: Stream, mark: Mark) -> None:
        match mark.kind:
            case "D":
                self._session.output.write(mark.step, stream, _decoded(mark.value))
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
        if step == self._step or self._end_if_failed():
            return
        self._tell_end()
        self._step, self._begun = step, self._clock()
        self._events.started(step)

    def _finish(self, mark: Mark) -> None:
        code = int(mark.value) if mark.value.isdecimal() else 1
        if code:
            self._fail(StepFailed(f"the command exited with status {code}", step=mark.step, exit_code=code))
            return
        if mark.step in self._missing:
            self._missing.remove(mark.step)
        self._ended = (0, self._clock() - self._begun)

    def _explained(self, mark: Mark) -> FirebuildError:
        if mark.step == 0:
            return InputError(f"{_TOO_OLD}: {mark.value}", hint=_HINT)
        return StepFailed(mark.value, step=mark.step)

    # --- the end --------------------------------------------------------------------------------

    def _fail(self, error: FirebuildError) -> None:
        if self._failure is not None:
            return
        self._failure = failure(error)
        if isinstance(error, StepFailed):
            self._ended = (error.exit_code or 1, self._clock() - self._begun)
            self._failure = Outcome(
                ending=Ending.ABORTED,
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
        step = min(self._missing, default=0)
        return StepFailed(f"the guest reported success, but step {step} was not seen to end", step=step)

    def _guess(self, text: str) -> FirebuildError:
        text = text or "the guest gave no reason"
        if not self._ready:
            return InputError(f"{_TOO_OLD}, which needs a shell in it, /bin/sh: {text}", hint=_HINT)
        return StepFailed(text, step=self._step, hint=_NOT_UTF8 if _CUT_OFF.search(text) else None)

    def _flush(self) -> None:
        for stream, channel in self._channels.items():
            if rest := channel.marks.rest():
                self._write(stream, rest, whole=True)
        self._tell_end()

    def _tell_end(self) -> None:
        if self._ended is not None and self._step:
            self._events.finished(self._step, *self._ended)
        self._ended = None

    def _write(self, stream: Stream, text: str, *, whole: bool) -> None:
        if self._trims and whole and not text.endswith("\n"):
            text += "\n"
        self._session.output.write(self._channels[stream].step, stream, text.encode())


def _decoded(value: str) -> bytes:
    """Return the output in a mark; line feeds among the base64 mean nothing."""
    try:
        return binascii.a2b_base64(value)
    except ValueError:
        return value.encode()
