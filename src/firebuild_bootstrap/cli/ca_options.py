"""What the commands about certificate authorities share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from firebuild_bootstrap.cli.options import complete_providers

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def provider_option(function: FunctionT) -> FunctionT:
    """Add `--ca PROVIDER`."""
    help_text = "CA provider to use instead of the configured one."
    return click.option(
        "--ca", "provider", metavar="PROVIDER", shell_complete=complete_providers, help=help_text
    )(function)


def json_option(function: FunctionT) -> FunctionT:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")(function)


@contextmanager
def interruptible(what: str) -> Iterator[Callable[[], None]]:
    """Notice signals at safe points, so that what was begun is also ended.

    Args:
        what: what the signals interrupt, for the message.

    Yields:
        A function to call again and again; it raises `Interrupted` once a signal has come.
    """
    from firebuild_bootstrap.errors import Interrupted
    from firebuild_bootstrap.interrupts import Interrupts

    interrupts = Interrupts()
    try:
        with interrupts.installed():
            yield interrupts.check
            interrupts.check()
    except Interrupted as error:
        raise Interrupted(error.message.replace("the build", what)) from error
