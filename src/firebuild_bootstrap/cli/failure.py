"""How an error looks on the terminal."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from firebuild_bootstrap.errors import (
    ExitStatus,
    InputError,
    Interrupted,
    OutputError,
    exit_status_of,
    in_words,
)
from firebuild_bootstrap.terminal import colours_wanted
from firebuild_pki.display import block, one_line
from firebuild_pki.errors import causes

if TYPE_CHECKING:
    from firebuild_bootstrap.events import EventSink

_TRACEBACK_LIMIT = 100_000


def report(error: BaseException) -> ExitStatus:
    """Write the error to stderr and return its exit status.

    An error that is nobody's mistake but ours is named in one line; `FIREBUILD_DEBUG=1` shows where it
    happened.
    """
    story = _story(error)
    status = exit_status_of(story)
    with suppress(OSError):  # stderr may be full or gone as well; the status still tells
        if status is ExitStatus.INTERNAL:
            _say_internal(story)
        elif not (isinstance(story, OutputError) and story.reader_gone):
            _say(str(story))
    return status


@contextmanager
def error_first(renderer: EventSink) -> Iterator[EventSink]:
    """Show why a build failed as soon as that is known; what follows is only the clean-up.

    Args:
        renderer: shows the other events, and ends its line at `BuildFailed`.

    Yields:
        the receiver of the build's events.

    Raises:
        SystemExit: the build failed and its error has been shown, so that only the status is left to tell.
    """
    from firebuild_bootstrap.events import BuildFailed, Event

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
            with suppress(OSError):
                _say(event.message)

    try:
        yield receive
    except (Exception, Interrupted) as error:
        if told:
            sys.exit(exit_status_of(error))
        raise


def _story(error: BaseException) -> BaseException:
    """Return the error that explains this one best."""
    for cause in causes(error):
        if isinstance(cause, OutputError):
            return cause
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, click.exceptions.Abort):
        return Interrupted("interrupted")
    return in_words(error)


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


def _say(text: str) -> None:
    error = click.style("error:", fg="red", bold=True) if colours_wanted(os.environ) else "error:"
    click.echo(f"{error} {block(text)}", err=True)


def _say_internal(error: BaseException) -> None:
    _say(f"internal error: {type(error).__name__}: {one_line(str(error))}")
    if os.environ.get("FIREBUILD_DEBUG"):
        click.echo(block("".join(traceback.format_exception(error)), _TRACEBACK_LIMIT), err=True, nl=False)
    else:
        click.echo("  hint: FIREBUILD_DEBUG=1 shows where; please report it", err=True)
