"""Renders the events of a build: live on a terminal, as plain lines in a pipe, or as JSON lines.

What the guest writes is passed on byte for byte; the renderers only add lines of their own between
its lines.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, Literal, Protocol

from firebuild_bootstrap.errors import OutputError
from firebuild_bootstrap.events import (
    BuildFailed,
    BuildStarted,
    Event,
    ImageStored,
    Notice,
    PeerRefused,
    StepFinished,
    StepOutput,
    StepStarted,
)

ProgressMode = Literal["auto", "plain", "rawjson"]

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _RESET = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 0))


class Renderer(Protocol):
    """Receives every event of a build, from any thread."""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        ...

    def close(self) -> None:
        """Finish the last line; nothing is shown afterwards."""
        ...


def make_renderer(mode: ProgressMode, out: BinaryIO, *, terminal: bool) -> Renderer:
    """Choose the renderer: `auto` is live on a terminal and plain elsewhere."""
    if mode == "rawjson":
        return JsonRenderer(out)
    if mode == "auto" and terminal:
        return TerminalRenderer(out)
    return PlainRenderer(out)


def human_size(size: int) -> str:
    """Write a number of bytes with a binary unit and three significant digits: `67.1 MiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


class JsonRenderer:
    """One event a line, in the schema of `firebuild_bootstrap.events`."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Write the event as one line of JSON."""
        line = json.dumps(event.as_json(), ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self._out.write(line)
            self._out.flush()

    def close(self) -> None:
        """Nothing is pending."""


class PlainRenderer:
    """Plain lines: a header per step, its output as it came, and how long it took."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._lock = threading.RLock()
        self._at_line_start = True
        self._steps: dict[int, StepStarted] = {}
        self._handlers: dict[type[Event], Callable[..., None]] = {
            BuildStarted: self._build_started,
            StepStarted: self._step_started,
            StepOutput: self._step_output,
            StepFinished: self._step_finished,
            Notice: self._notice,
            PeerRefused: self._peer_refused,
            ImageStored: self._image_stored,
            BuildFailed: lambda _: self._fresh_line(),  # the error itself goes to standard error
        }

    def __call__(self, event: Event) -> None:
        """Show the event, if it is one that people read."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            with self._lock:
                handler(event)
                self._out.flush()

    def close(self) -> None:
        """End an unfinished line of output."""
        with self._lock:
            self._fresh_line()
            self._out.flush()

    def _line(self, text: str, style: str = "") -> None:
        self._fresh_line()
        self._out.write(self._styled(text, style).encode(errors="replace") + b"\n")

    def _styled(self, text: str, style: str) -> str:  # noqa: ARG002 - the terminal has styles
        return text

    def _fresh_line(self) -> None:
        if not self._at_line_start:
            self._out.write(b"\n")
            self._at_line_start = True

    def _build_started(self, event: BuildStarted) -> None:
        self._line(f"Building {event.tag} (build {event.build_id}, CA {event.ca_provider})", _BOLD)

    def _step_started(self, event: StepStarted) -> None:
        self._steps[event.step] = event
        self._line(self._header(event), _BOLD)

    def _header(self, event: StepStarted) -> str:
        return f"[{event.step}/{event.total}] {event.instruction}"

    def _step_output(self, event: StepOutput) -> None:
        self._out.write(event.data)
        self._at_line_start = event.data.endswith(b"\n")

    def _step_finished(self, event: StepFinished) -> None:
        started = self._steps.get(event.step)
        number = f"[{event.step}/{started.total}] " if started else ""
        if event.exit_code:
            self._line(f"{number}failed after {event.seconds:.1f}s, exit code {event.exit_code}", _RED)
        else:
            self._line(f"{number}done in {event.seconds:.1f}s", _DIM)

    def _notice(self, event: Notice) -> None:
        self._line(f"{event.level}: {event.message}", _YELLOW if event.level == "warning" else "")

    def _peer_refused(self, event: PeerRefused) -> None:
        who = f" (subject {event.subject}, SHA-256 {event.fingerprint_sha256})" if event.subject else ""
        self._line(f"warning: refused a connection from {event.peer}: {event.reason}{who}", _YELLOW)

    def _image_stored(self, event: ImageStored) -> None:
        self._line(f"Built {event.tag} in {event.seconds:.1f}s", _GREEN)
        self._line(f"  image   {event.path}")
        self._line(f"  size    {human_size(event.size)}")
        self._line(f"  digest  {event.digest}")


class TerminalRenderer(PlainRenderer):
    """Colours, and a running clock behind the header of a step until it writes something."""

    def __init__(self, out: BinaryIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(out)
        self._clock = clock
        self._pending: StepStarted | None = None
        self._since = 0.0
        self._closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        """Stop the clock and end the line."""
        self._closed.set()
        self._ticker.join()
        super().close()

    def _tick(self) -> None:
        # A terminal that has gone is for the thread of the next event to tell.
        with suppress(OSError, OutputError):
            while not self._closed.wait(0.5):
                with self._lock:
                    self._show_clock()

    def _show_clock(self) -> None:
        if self._pending is not None:
            self._rewrite(self._pending, f"{self._clock() - self._since:.0f}s", _DIM)
            self._out.flush()

    def _rewrite(self, step: StepStarted, suffix: str, style: str) -> None:
        line = f"{_BOLD}{self._header(step)}{_RESET} {style}{suffix}{_RESET}"
        self._out.write(b"\r\x1b[K" + line.encode(errors="replace"))
        self._at_line_start = False

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if style else text

    def _fresh_line(self) -> None:
        self._pending = None
        super()._fresh_line()

    def _step_started(self, event: StepStarted) -> None:
        self._fresh_line()
        self._steps[event.step] = self._pending = event
        self._since = self._clock()
        self._rewrite(event, "", "")

    def _step_output(self, event: StepOutput) -> None:
        if self._pending is not None:
            self._rewrite(self._pending, "", "")
            self._fresh_line()
        super()._step_output(event)

    def _step_finished(self, event: StepFinished) -> None:
        if self._pending is not None and not event.exit_code:
            self._rewrite(self._pending, f"{event.seconds:.1f}s", _DIM)
            self._fresh_line()
        else:
            super()._step_finished(event)
