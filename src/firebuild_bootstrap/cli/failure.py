"""How an error looks on the terminal."""

from __future__ import annotations

import errno
import os
import traceback
from contextlib import suppress

import click

from firebuild_bootstrap.errors import (
    ExitStatus,
    InputError,
    Interrupted,
    MachineError,
    OutputError,
    exit_status_of,
)
from firebuild_pki.errors import causes

# What an operating system refuses for want of room or rights, wherever it happens.
_SURROUNDINGS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)


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


def _story(error: BaseException) -> BaseException:
    """Return the error that explains this one best."""
    for cause in causes(error):
        if isinstance(cause, OutputError):
            return cause
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, click.exceptions.Abort):
        return Interrupted("interrupted")
    if isinstance(error, OSError) and error.errno in _SURROUNDINGS:
        where = f"{error.filename}: " if error.filename else ""
        return MachineError(f"{where}{error.strerror}", hint="free some space or rights there")
    return error


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
    click.echo(f"{click.style('error:', fg='red', bold=True)} {text}", err=True)


def _say_internal(error: BaseException) -> None:
    _say(f"internal error: {type(error).__name__}: {' '.join(str(error).split())}")
    if os.environ.get("FIREBUILD_DEBUG"):
        traceback.print_exception(error)
    else:
        click.echo("  hint: FIREBUILD_DEBUG=1 shows where; please report it", err=True)
