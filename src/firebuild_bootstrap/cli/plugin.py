"""`firebuild plugin`: begin a plugin of your own."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from firebuild_pki.display import one_line


@click.group()
def plugin() -> None:
    """Begin a plugin of your own."""


@plugin.command()
@click.argument("name")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default="the current directory",
    help="Where to put the new project.",
)
def new(name: str, directory: Path) -> None:
    """Write the project of a new CA provider that works, with its tests.

    NAME is what people will write in their configuration: ca.provider: NAME.
    """
    from firebuild_bootstrap.errors import InputError
    from firebuild_pki import CAError, new_plugin

    try:
        project = new_plugin(name, directory)
    except CAError as error:
        raise InputError(error.message, hint=error.hint) from error
    click.echo(f"wrote {one_line(str(project))}\n\nTry it:")
    for command in (
        f"cd {shlex.quote(str(project))}",
        "pip install -e . pytest",
        "pytest",
        f"firebuild ca check --ca {name.removeprefix('firebuild-pki-')}",
    ):
        click.echo(f"  {one_line(command)}")
