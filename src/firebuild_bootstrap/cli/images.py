"""`firebuild images`: what has been built, and what it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from firebuild_bootstrap.cli.docker import Commands
from firebuild_bootstrap.cli.options import (
    complete_tags,
    config_option,
    home_from,
    json_option,
    settings_from,
)
from firebuild_pki.display import one_line

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.names import Reference


@click.group(cls=Commands)
def images() -> None:
    """List, show, name and remove images."""


@images.command("list")
@json_option
@config_option
def list_(as_json: bool, config_file: Path | None) -> None:
    """List the images: tag, when they were built, size, forms."""
    from firebuild_bootstrap.cli.imagejson import as_text, image_document
    from firebuild_bootstrap.cli.screen import print_table
    from firebuild_bootstrap.progress import human_size

    found = home_from(settings_from(config_file)).images.list()
    if as_json:
        click.echo(as_text([image_document(image) for image in found]), nl=False)
        return
    rows = []
    for image in found:
        outputs = image.record.outputs
        size = human_size(sum(output.size for output in outputs))
        forms = ", ".join(output.type.value for output in outputs)
        rows.append((str(image.tag), image.record.created, size, forms))
    print_table(("TAG", "CREATED", "SIZE", "OUTPUTS"), rows)


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@config_option
def inspect(tag: str, config_file: Path | None) -> None:
    """Print all that is known about an image, as JSON."""
    from firebuild_bootstrap.cli.imagejson import image_json

    image = home_from(settings_from(config_file)).images.inspect(_tag(tag))
    click.echo(image_json(image), nl=False)


@images.command()
@click.argument("tag", shell_complete=complete_tags)
@click.option("--output", "-o", "kind", type=click.Choice(["ext4", "tar", "dir"]), help="Only this one.")
@config_option
def path(tag: str, kind: str | None, config_file: Path | None) -> None:
    """Print where the outputs of an image are, one a line; the same paths after it was built again."""
    from firebuild_bootstrap.errors import InputError

    image = home_from(settings_from(config_file)).images.inspect(_tag(tag))
    outputs = [output for output in image.record.outputs if kind in (None, output.type.value)]
    if not outputs:
        there = ", ".join(output.type.value for output in image.record.outputs)
        raise InputError(f"the image {image.tag} has no output {kind}", hint=f"it has {there}")
    for output in outputs:
        click.echo(os.fsencode(image.location / output.path))  # for programs: exactly as it is


@images.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", shell_complete=complete_tags)
@click.option("--force", "-f", is_flag=True, hidden=True, expose_value=False)
@config_option
def rm(tags: tuple[str, ...], config_file: Path | None) -> None:
    """Remove images: all that are named, or none if one of them is not there."""
    store = home_from(settings_from(config_file), writable=True).images
    wanted = dict.fromkeys(map(_tag, tags))
    known = set(store.names())
    for tag in wanted:
        if tag not in known:
            store.remove(tag)  # says what there is
    for tag in wanted:
        store.remove(tag)
        click.echo(f"removed {tag}")


@images.command("tag")
@click.argument("tag", shell_complete=complete_tags)
@click.argument("new")
@config_option
def tag_(tag: str, new: str, config_file: Path | None) -> None:
    """Give an image one more name; an image that had it before loses it."""
    home_from(settings_from(config_file), writable=True).images.tag(_tag(tag), _tag(new))
    click.echo(f"{_tag(tag)} is {_tag(new)} too")


@images.command()
@click.option("--failed", is_flag=True, help="Also what --keep-on-failure kept in the store.")
@click.option("--dry-run", "-n", is_flag=True, help="Only print what would be removed.")
@click.option("--force", "-f", is_flag=True, hidden=True, expose_value=False)
@config_option
def prune(failed: bool, dry_run: bool, config_file: Path | None) -> None:
    """Remove images that were built without a tag, and what crashed builds left behind.

    Images with a name and bases stay; `firebuild images rm` and `firebuild base rm` remove those.
    """
    from firebuild_bootstrap.image.trees import allocated
    from firebuild_bootstrap.progress import human_size

    home = home_from(settings_from(config_file), writable=not dry_run)
    before = 0 if dry_run else allocated(home.root)
    verb = "would remove" if dry_run else "removed"
    for tag in home.images.names():
        if tag.is_untagged:
            if not dry_run:
                home.images.remove(tag)
            click.echo(f"{verb} {tag}")
    for directory in _entries(home.root / "failed") if failed else ():
        if not dry_run:
            home.trees.remove(directory)
        click.echo(f"{verb} {one_line(str(directory))}")
    if not dry_run:
        _sweep(home)
        click.echo(f"freed {human_size(max(before - allocated(home.root), 0))}")


@click.command()
@json_option
@config_option
def du(as_json: bool, config_file: Path | None) -> None:
    """Show what the store takes on the disk.

    Holes take nothing, and what images share is counted once in the total.
    """
    from firebuild_bootstrap.cli.imagejson import as_text
    from firebuild_bootstrap.cli.screen import print_table
    from firebuild_bootstrap.image.trees import allocated
    from firebuild_bootstrap.progress import human_size

    home = home_from(settings_from(config_file))
    used = list(_usage(home))
    total = allocated(home.root)
    if as_json:
        entries = [{"kind": one.kind, "name": one.name, "bytes": one.size} for one in used]
        click.echo(as_text({"path": str(home.root), "bytes": total, "entries": entries}), nl=False)
        return
    rows = [(one.kind, one.name, human_size(one.size)) for one in used]
    print_table(("KIND", "NAME", "SIZE"), [*rows, ("total", str(home.root), human_size(total))])


images.add_command(du)


@dataclass(frozen=True)
class _Used:
    """What one thing in the store takes, in bytes."""

    kind: str
    name: str
    size: int


def _usage(home: Home) -> Iterator[_Used]:
    from firebuild_bootstrap.image.trees import allocated

    for image in home.images.list():
        yield _Used("image", str(image.tag), allocated(image.directory))
    for base in home.bases.list():
        yield _Used("base", base.name, allocated(base.archive.parent))
    kinds = {"builds": "build", "failed": "failed", "removing": "removing"}
    for folder, kind in kinds.items():
        for directory in _entries(home.root / folder):
            yield _Used(kind, directory.name, allocated(directory))
    for other in _entries(home.root, files=True):
        if other.name not in ("images", "bases", *kinds):
            kind = "cache" if other.name in ("cache", "cache-mounts", "layers") else "other"
            yield _Used(kind, other.name, allocated(other))


def _entries(directory: Path, *, files: bool = False) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if files or path.is_dir())
    except FileNotFoundError:
        return []


def _sweep(home: Home) -> None:
    import secrets

    home.images.sweep()
    home.bases.sweep()
    home.workspace(f"prune-{secrets.token_hex(4)}").close()  # each new build removes what dead ones left


def _tag(text: str) -> Reference:
    from firebuild_bootstrap.image.names import Reference

    return Reference.parse_tag(text)
