"""The terminal of `build --debug-shell`: a shell has it from when a RUN has failed until the shell ends."""

from __future__ import annotations

import os
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from firebuild_bootstrap.cli.display import window_size
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.events import BuildFailed, Event
from firebuild_bootstrap.layers.tar import write_all
from firebuild_bootstrap.polling import readable
from firebuild_bootstrap.progress import Renderer
from firebuild_bootstrap.service.console import Console
from firebuild_bootstrap.wire import Attach
from firebuild_pki.display import one_line

_POLL_SECONDS: Final = 0.1
_SIZE_SECONDS: Final = 0.25
_PIECE: Final = 64 * 1024
_WHY: Final = 400


def check_terminal(progress: str) -> None:
    """Make sure that a shell could have the terminal.

    Raises:
        InputError: there is none, or it carries something else.
    """
    missing = [
        name for name, file in (("input", sys.stdin), ("output", sys.stdout)) if not _is_terminal(file)
    ]
    if missing:
        raise InputError(
            f"--debug-shell: standard {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} "
            "not a terminal",
            hint="leave --debug-shell out, or use --keep-on-failure to look at a failed build later",
        )
    if progress == "rawjson":
        raise InputError(
            "--debug-shell and --progress rawjson can't be used together",
            hint="leave --progress out, or take --keep-on-failure to look at a failed build later",
        )


def _is_terminal(file: Any) -> bool:
    return file is not None and file.isatty()


class Turns:
    """Who has the terminal; of several that want it, one after the other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken = False
        self._waiting = 0

    def take(self, check: Callable[[], object]) -> None:
        """Wait until nobody has it; `check` is called meanwhile, and may raise."""
        with self._changed:
            self._waiting += 1
            try:
                self._wait(check, lambda: self._taken)
                self._taken = True
            finally:
                self._waiting -= 1

    def give_back(self) -> None:
        """Let the next have it."""
        with self._changed:
            self._taken = False
            self._changed.notify_all()

    def await_end(self, check: Callable[[], object]) -> None:
        """Wait until nobody has it or waits for it; `check` is called meanwhile, and may raise."""
        with self._changed:
            self._wait(check, lambda: self._taken or self._waiting > 0)

    def _wait(self, check: Callable[[], object], held: Callable[[], bool]) -> None:
        while held():
            self._changed.wait(_POLL_SECONDS)
            check()


class TerminalShell:
    """The one terminal of this process, which one shell has at a time.

    Args:
        renderer: shows the events of the build, which pass through here, and nothing while there is a shell.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._turns = Turns()
        self._past = 0.0
        self._began = 0.0
        self._before: list[Any] | None = None

    def __call__(self, event: Event) -> None:
        """Pass an event on; an error is shown on a terminal in order, whoever has it."""
        if isinstance(event, BuildFailed):
            self.abandon()
        self._renderer(event)

    @property
    def seconds(self) -> float:
        """How long shells have been open."""
        began = self._began
        return self._past + (time.monotonic() - began if began else 0.0)

    @contextmanager
    def opened(self, why: str, check: Callable[[], object]) -> Iterator[tuple[Console, Attach]]:
        """Have the terminal until the block ends; see `FailureShell`."""
        self._turns.take(check)
        try:
            self._began = time.monotonic()
            self._renderer.pause()
            try:
                with self._raw(why), _pumped() as opened:
                    yield opened
            finally:
                self._renderer.resume()
        finally:
            self._past, self._began = self.seconds, 0.0
            self._turns.give_back()

    def await_end(self, check: Callable[[], object]) -> None:
        """Wait until nobody has the terminal, or waits for it."""
        self._turns.await_end(check)

    @contextmanager
    def _raw(self, why: str) -> Iterator[None]:
        text = f"{one_line(why, _WHY)}\nThis is a shell in its place: the build ends when the shell does.\n"
        _write(text.encode(errors="replace"))
        self._before = termios.tcgetattr(0)
        tty.setraw(0)
        try:
            yield
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leave the terminal as it was; may be called in a signal handler."""
        before, self._before = self._before, None
        if before is not None:
            with suppress(termios.error):  # it has gone
                termios.tcsetattr(0, termios.TCSADRAIN, before)
            _write(b"\n")


@contextmanager
def _pumped() -> Iterator[tuple[Console, Attach]]:
    """Yield a console that gets what is typed, and the size of the terminal when it changes."""
    console = Console(output=_write)
    size = window_size()
    ended, end = os.pipe()
    pump = threading.Thread(target=_pump, args=(console, size, ended), name="stdin", daemon=True)
    pump.start()
    try:
        yield console, Attach(input=True, terminal=True, rows=size[0], columns=size[1])
    finally:
        console.close()
        os.close(end)  # what is typed from now on is for whoever has the terminal next
        pump.join()
        os.close(ended)


def _pump(console: Console, size: tuple[int, int], ended: int) -> None:
    sources = [0, ended]
    while True:
        # Signals of a new size come to the main thread, which the build has.
        ready = readable(*sources, seconds=_SIZE_SECONDS)
        if ended in ready:
            return
        if (now := window_size()) != size:
            size = now
            console.resize(*size)
        if 0 in ready:
            data = _read()
            if data:
                console.write(data)
            else:
                sources.remove(0)
                console.end_input()


def _read() -> bytes:
    try:
        return os.read(0, _PIECE)
    except OSError:  # the terminal has gone
        return b""


def _write(data: bytes) -> None:
    with suppress(OSError):  # the terminal has gone; the signal that comes with that ends the build
        write_all(sys.stdout.fileno(), data)
