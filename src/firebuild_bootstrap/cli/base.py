"""`firebuild base`: what builds start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.ca_options import json_option
from firebuild_bootstrap.cli.docker import Commands
from firebuild_bootstrap.cli.options import (
    complete_bases,
    config_option,
    home_from,
    settings_from,
    watched,
)

if TYPE_CHECKING:
    from firebuild_bootstrap.image.bases import Base
    from firebuild_bootstrap.image.config import ImageConfig


@click.group(cls=Commands)
def base() -> None:
    """Import, list and remove the bases that FROM names."""


@base.command("import")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--image-config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON with the base's OCI config (Env, Entrypoint, User, …).",
)
@config_option
def import_(name: str, path: Path, image_config: Path | None, config_file: Path | None) -> None:
    """Keep a directory or tar archive as the base NAME[:TAG], replacing an older one."""
    config = _read_config(image_config)
    with watched(config_file) as home:
        kept = home.bases.import_base(name, path, config)
    _say_kept(kept)


@base.command("from-host")
@click.argument("name", default="host")
@config_option
def from_host(name: str, config_file: Path | None) -> None:
    """Make a base of this machine's own shell and core tools; needs no download and no root."""
    with watched(config_file) as home:
        kept = home.bases.create_from_host(name)
    _say_kept(kept)


@base.command("list")
@json_option
@config_option
def list_(as_json: bool, config_file: Path | None) -> None:
    """List the bases: name, when they were imported, size, digest."""
    from firebuild_bootstrap.cli.imagejson import as_text
    from firebuild_bootstrap.cli.table import print_table
    from firebuild_bootstrap.progress import human_size

    bases = home_from(settings_from(config_file)).bases.list()
    if as_json:
        click.echo(as_text([_document(found) for found in bases]), nl=False)
        return
    rows = [(found.name, found.imported, human_size(found.size), found.digest) for found in bases]
    print_table(("NAME", "IMPORTED", "SIZE", "DIGEST"), rows)


@base.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_bases)
@config_option
def rm(names: tuple[str, ...], config_file: Path | None) -> None:
    """Remove bases, all that are named or none if one is not there; images built from them stay."""
    from firebuild_bootstrap.image.names import Reference

    store = home_from(settings_from(config_file), writable=True).bases
    wanted = {Reference.parse_tag(name): name for name in names}
    known = set(store.names())
    for name in (name for tag, name in wanted.items() if tag not in known):
        store.remove(name)  # says what there is
    for name in wanted.values():
        store.remove(name)
        click.echo(f"removed {name}")


def _document(found: Base) -> dict[str, Any]:
    return {
        "name": found.name,
        "imported": found.imported,
        "size": found.size,
        "digest": found.digest,
        "path": str(found.archive),
        "config": found.config.as_json(),
    }


def _say_kept(kept: Base) -> None:
    from firebuild_bootstrap.progress import human_size

    click.echo(f"{kept.name}  {human_size(kept.size)}  {kept.digest}")


def _read_config(path: Path | None) -> ImageConfig | None:
    import json

    from firebuild_bootstrap.errors import InputError, Location
    from firebuild_bootstrap.image.config import ImageConfig

    if path is None:
        return None
    where = Location(str(path))
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON: {error}", location=where) from error
    if not isinstance(document, dict):
        raise InputError(f"expected a JSON object, found {document!r:.40}", location=where)
    try:
        return ImageConfig.from_json(document)
    except InputError as error:
        raise InputError(error.message, hint=error.hint, location=where) from error
