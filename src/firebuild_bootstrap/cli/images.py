"""`firebuild images`: what has been built."""

from __future__ import annotations

from pathlib import Path

import click

from firebuild_bootstrap.cli.options import config_option, home_from, settings_from


@click.group()
def images() -> None:
    """List, show and remove images."""


@images.command("list")
@config_option
def list_(config_file: Path | None) -> None:
    """List the images: tag, when they were built, size, forms."""
    from firebuild_bootstrap.cli.table import print_table
    from firebuild_bootstrap.progress import human_size

    rows = []
    for image in home_from(settings_from(config_file)).images.list():
        outputs = image.record.outputs
        size = human_size(sum(output.size for output in outputs))
        forms = ", ".join(output.type.value for output in outputs)
        rows.append((str(image.tag), image.record.created, size, forms))
    print_table(("TAG", "CREATED", "SIZE", "OUTPUTS"), rows)


@images.command()
@click.argument("tag")
@config_option
def inspect(tag: str, config_file: Path | None) -> None:
    """Print all that is known about an image, as JSON."""
    from firebuild_bootstrap.cli.imagejson import image_json
    from firebuild_bootstrap.image.names import Reference

    image = home_from(settings_from(config_file)).images.inspect(Reference.parse_tag(tag))
    click.echo(image_json(image), nl=False)


@images.command()
@click.argument("tag")
@config_option
def rm(tag: str, config_file: Path | None) -> None:
    """Remove an image."""
    from firebuild_bootstrap.image.names import Reference

    home_from(settings_from(config_file)).images.remove(Reference.parse_tag(tag))
    click.echo(f"removed {tag}")
