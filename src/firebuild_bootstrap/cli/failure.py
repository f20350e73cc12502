"""How an error looks on the terminal."""

from __future__ import annotations

import os
import traceback

import click

from firebuild_bootstrap.errors import ExitStatus, exit_status_of


def report(error: BaseException) -> ExitStatus:
    """Write the error to stderr and return its exit status.

    An error that is nobody's mistake but ours is named in one line; `FIREBUILD_DEBUG=1` shows where it
    happened.
    """
    status = exit_status_of(error)
    label = click.style("error:", fg="red", bold=True)
    if status is not ExitStatus.INTERNAL:
        click.echo(f"{label} {error}", err=True)
        return status
    click.echo(f"{label} internal error: {type(error).__name__}: {error}", err=True)
    if os.environ.get("FIREBUILD_DEBUG"):
        traceback.print_exception(error)
    else:
        click.echo("  hint: FIREBUILD_DEBUG=1 shows where; please report it", err=True)
    return status
