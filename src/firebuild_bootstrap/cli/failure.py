"""How a command ends: its error on the terminal, its exit status, and what signals do to it.

SIGINT, SIGTERM and SIGHUP end every command with status 130, without a traceback and after its clean-up. An
exception raised in a signal handler could hit any statement, with a lock held or a process just started.
So during a build the handler only sets a flag, and the build checks it wherever it waits. Other commands hold
nothing of that kind, and have nowhere to check: there the handler raises `KeyboardInterrupt`.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from firebuild_bootstrap.errors import (
    ExitStatus,
    InputError,
    Interrupted,
    OutputError,
    as_user_error,
    exit_status_of,
)
from firebuild_bootstrap.terminal import colours_wanted
from firebuild_pki.display import block, one_line
from firebuild_pki.errors import causes

if TYPE_CHECKING:
    from firebuild_bootstrap.events import EventSink


_TRACEBACK_LIMIT = 100_000


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


# How CPython calls the module that imports all others.
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


def report(error: BaseException) -> ExitStatus:
    """Write the error to stderr and return its exit status.

    An internal error is reported in one line; `FIREBUILD_DEBUG=1` shows where it
    happened.
    """
    shown = _root_error(error)
    status = exit_status_of(shown)
    with suppress(OSError):  # stderr may be full or gone as well; the exit status remains
        if status is ExitStatus.INTERNAL:
            _print_internal(shown)
        elif not (isinstance(shown, OutputError) and shown.reader_gone):
            _print(str(shown))
    return status


@contextmanager
def error_first(renderer: EventSink, *, output_shown: bool = False) -> Iterator[EventSink]:
    """Show why a build failed as soon as that is known; what follows is only the clean-up.

    Args:
        renderer: shows the other events, and ends its line at `BuildFailed`.
        output_shown: it has shown there what the failed step wrote; a terminal need not see its end again.

    Yields:
        the receiver of the build's events.

    Raises:
        SystemExit: the build failed and its error has been shown, so that only the status is left to tell.
    """
    from firebuild_bootstrap.events import BuildFailed, Event
    from firebuild_bootstrap.failures import without_output

    told = False

    def receive(event: Event) -> None:
        nonlocal told
        renderer(event)
        # `report` shows where a mistake of ours happened; of a standard output that has gone it says nothing.
        if isinstance(event, BuildFailed) and event.exit_status not in (
            ExitStatus.INTERNAL,
            ExitStatus.OUTPUT,
        ):
            told = True
            again = not (output_shown and sys.stderr is not None and sys.stderr.isatty())
            with suppress(OSError):
                _print(event.message if again else without_output(event))

    try:
        yield receive
    except (Exception, Interrupted) as error:
        if told:
            sys.exit(exit_status_of(error))
        raise


def _root_error(error: BaseException) -> BaseException:
    """Return the error that explains this one best."""
    for cause in causes(error):
        if isinstance(cause, OutputError):
            return cause
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, click.exceptions.Abort):
        return Interrupted("interrupted")
    return as_user_error(error)


def _usage(error: click.ClickException) -> InputError:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None:
        return InputError(message)
    if message.startswith("Usage:"):  # help is what click says to a group without a command
        message = f"expected a command after `{context.command_path}`\n\n{message}"
        return InputError(message)
    hint = f"`{context.command_path} --help` says what is expected"
    return InputError(f"{message[:1].lower()}{message[1:].rstrip('.')}", hint=hint)


def _print(text: str) -> None:
    error = click.style("error:", fg="red", bold=True) if colours_wanted(os.environ) else "error:"
    click.echo(f"{error} {block(text)}", err=True)


def _print_internal(error: BaseException) -> None:
    _print(f"internal error: {type(error).__name__}: {one_line(str(error))}")
    if os.environ.get("FIREBUILD_DEBUG"):
        click.echo(block("".join(traceback.format_exception(error)), _TRACEBACK_LIMIT), err=True, nl=False)
    else:
        click.echo("  hint: FIREBUILD_DEBUG=1 shows where; please report it", err=True)


class Interrupts:
    """The signals of one build, or of one command.

    Args:
        raising: raise `KeyboardInterrupt` at once instead of waiting for `check`.
    """

    def __init__(self, *, raising: bool = False) -> None:
        self._raising = raising
        self._received: signal.Signals | None = None
        self.at_sudden_end: Callable[[], None] = lambda: None
        """Called right before a second signal ends the process, or Ctrl-Z stops it, in the handler, so it may
        take no lock."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals until the block ends; main thread only.

        A second signal ends the process at once, with the same exit status. What it leaves is removed by
        the cleanup process of the build's workspace.
        """
        handle = self._raise if self._raising else self._handle
        previous = {
            number: signal.signal(number, handle) for number in SIGNALS if not _hung_up_for_good(number)
        }
        if not self._raising and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
            previous[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                # On the way out an impatient signal must not replace the exit status.
                signal.signal(number, signal.SIG_IGN if self._received else handler)

    def check(self) -> None:
        """Return if no signal has arrived.

        Raises:
            Interrupted: one has; the message names it.
        """
        if self._received is not None:
            raise Interrupted(f"the build was interrupted ({self._received.name})")

    def instead_of(self, error: BaseException) -> BaseException:
        """Return the interruption if there was one, whatever came of the exception on its way up."""
        return error if self._received is None else Interrupted(f"interrupted ({self._received.name})")

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        while frame is not None:
            if frame.f_code.co_filename == _IMPORT_SYSTEM:
                # Its callbacks print an exception and go on, extension modules make others of it; and what a
                # command has not imported yet it has not used yet.
                os._exit(ExitStatus.INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        """Stop as Ctrl-Z means it, with a terminal that is in order for the shell."""
        with suppress(Exception):
            self.at_sudden_end()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # returns when the user lets it go on
        signal.signal(number, self._stop)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            with suppress(Exception):
                self.at_sudden_end()
            os.write(2, b"error: interrupted again, the rest is cleaned up in the background\n")
            os._exit(ExitStatus.INTERRUPTED)
        self._received = signal.Signals(number)


def _hung_up_for_good(number: signal.Signals) -> bool:
    """Tell whether this is SIGHUP, and nohup(1) has had it ignored."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
