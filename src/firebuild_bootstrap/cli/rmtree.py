"""`firebuild rm-tree`: directories that a build wrote, with files that belong to nobody on this host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from firebuild_bootstrap.cli.options import config_option, home_from, settings_from
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home


@click.command("rm-tree")
@click.argument("directories", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@config_option
def rm_tree(directories: tuple[Path, ...], config_file: Path | None) -> None:
    """Remove directories that `--output dir,dest=DIR` or `--keep-on-failure` wrote.

    Their files may belong to subordinate ids of yours, so that `rm -r` can't remove them without root; this
    removes them in the id mapping of builds. Other file systems that are mounted in there stay.
    """
    home = home_from(settings_from(config_file))
    wanted = [_checked(directory, home) for directory in directories]
    for directory in wanted:
        home.trees.remove(directory)
        click.echo(f"removed {one_line(str(directory))}")


def _checked(given: Path, home: Home) -> Path:
    """Return the directory by its real path.

    Raises:
        InputError: it is none, or one whose loss nobody means.
    """
    from firebuild_bootstrap.errors import InputError

    try:
        if given.is_symlink():
            raise InputError(f"{given} is a symbolic link", hint="name the directory that it leads to")
        real = given.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError up to Python 3.12
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{given} can't be removed: {reason}") from error
    if not real.is_dir():
        raise InputError(f"{given} is no directory", hint=f"`rm {given}` removes it")
    kept = {"the current directory": Path.cwd(), "your home": Path.home(), "the store": home.root.resolve()}
    for what, path in kept.items():
        if path.is_relative_to(real):
            raise InputError(f"{given} can't be removed: {what} is in it, or is it")
    if real.is_mount():
        raise InputError(
            f"{given} can't be removed: it is the root of a file system", hint="unmount it first"
        )
    return real
