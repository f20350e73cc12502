"""How a command shows what it does: `--progress`, the terminal and the environment decide."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TextIO, cast, get_args

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.terminal import SafeOutput, colours_wanted, is_dumb
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.events import Event, EventSink
    from firebuild_bootstrap.progress import Renderer

Progress = Literal["auto", "plain", "tty", "quiet", "rawjson"]
PROGRESS: Final[tuple[str, ...]] = get_args(Progress)

# Of docker's users, as docs.docker.com says of buildx.
_VARIABLE: Final = "BUILDKIT_PROGRESS"


def window_size() -> tuple[int, int]:
    """Return the rows and columns of the terminal on standard output; zeros where there is none."""
    with suppress(OSError):
        size = os.get_terminal_size(sys.stdout.fileno())
        return size.lines, size.columns
    return 0, 0


def read_progress(given: Progress | None, environ: Mapping[str, str], *, quiet: bool) -> Progress:
    """Return how a build is shown.

    Args:
        given: what `--progress` says.
        environ: its BUILDKIT_PROGRESS counts where no option does.
        quiet: whether there is `--quiet`.

    Raises:
        InputError: the options contradict each other, or the variable has no such value.
    """
    if quiet and given not in (None, "auto", "quiet"):
        raise InputError(f"--quiet and --progress {given} can't be used together")
    if quiet:
        return "quiet"
    wanted = given or environ.get(_VARIABLE, "").strip() or "auto"
    if wanted not in PROGRESS:
        raise InputError(
            f"{_VARIABLE}: expected {', '.join(PROGRESS)}, found {one_line(wanted, 80)!r}",
            hint="unset it, or say --progress",
        )
    return cast("Progress", wanted)


def make_renderer(
    mode: Progress,
    stream: TextIO | None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Renderer:
    """Choose the renderer: `auto` is live on a terminal and plain elsewhere.

    Args:
        mode: what is wanted.
        stream: where it writes; None where the caller has closed that.
        environ: the environment, of which NO_COLOR and TERM count.
        directory: where the live display keeps the output of steps that go on.

    Raises:
        InputError: `tty` is wanted where there is no terminal.
    """
    from firebuild_bootstrap.progress import JsonRenderer, PlainRenderer

    if stream is None or mode == "quiet":
        return _Quiet()
    known = os.environ if environ is None else environ
    out, terminal, dumb = stream.buffer, stream.isatty(), is_dumb(known)
    if mode == "tty" and not terminal:
        raise InputError(
            "--progress tty: the output is not a terminal", hint="--progress plain works everywhere"
        )
    if mode == "rawjson":
        return JsonRenderer(out)
    if mode == "plain" or not terminal or dumb:
        return PlainRenderer(
            out, screen=SafeOutput(colours=not dumb) if terminal else None, directory=directory
        )
    from firebuild_bootstrap.live import TerminalRenderer

    return TerminalRenderer(out, colours=colours_wanted(known), directory=directory)


class Boot:
    """What is shown of a machine on a terminal until its command begins; then the terminal is the command's.

    Args:
        what: what goes on.
        stream: standard error; nothing is shown where that is not a terminal.
        command: receives all events of the command, and of the machine where nothing is shown.
    """

    def __init__(self, what: str, stream: TextIO | None, command: EventSink) -> None:
        from firebuild_bootstrap.events import EventBus, Tasks, TaskStarted

        self._command = command
        shown = stream is not None and stream.isatty()
        self._renderer: Renderer | None = make_renderer("auto", stream) if shown else None
        bus = EventBus(self)
        self.tasks = Tasks(bus)
        """Report what is pulled, say."""
        bus(TaskStarted(task=0, name=what))

    def __call__(self, event: Event) -> None:
        """Show one event."""
        from firebuild_bootstrap.events import Notice, StepOutput, StepStarted

        match event:
            case StepStarted() | StepOutput():
                self.close()
            case Notice(level="info"):  # it is said to who builds
                return
        (self._renderer or self._command)(event)

    def close(self) -> None:
        """Leave the terminal to the command, or to an error."""
        renderer, self._renderer = self._renderer, None
        if renderer is not None:
            renderer.close()


class _Quiet:
    """Shows nothing; what failed is in the error."""

    shows_failed_output = False

    def __call__(self, event: Event) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass
