"""`firebuild initramfs`: the initramfs that runs vminit in a virtual machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from firebuild_bootstrap.cli.options import FilePath, config_option, home_from, settings_from
from firebuild_bootstrap.cli.output import replaced
from firebuild_bootstrap.cli.paths import check_writable
from firebuild_pki.display import one_line


@click.group()
def initramfs() -> None:
    """Make an initramfs with vminit, for drives of any distribution."""


@initramfs.command()
@click.option(
    "--output",
    "-o",
    type=FilePath(path_type=Path, dir_okay=False),
    help="Write it to FILE as well; an existing one is replaced.",
    metavar="FILE",
)
@click.option(
    "--compress",
    "compression",
    type=click.Choice(("zstd", "lz4", "gzip", "none")),
    default="zstd",
    show_default=True,
    help="Compression, which the kernel must support.",
)
@click.option(
    "--kernel-modules",
    multiple=True,
    type=FilePath(path_type=Path, exists=True, file_okay=False),
    help="Modules of a kernel without built-in virtio drivers, as in /lib/modules/RELEASE; repeatable.",
    metavar="DIR",
)
@config_option
def build(
    output: Path | None, compression: str, kernel_modules: tuple[Path, ...], config_file: Path | None
) -> None:
    """Make the initramfs, unless the store has it, and print its path and size."""
    from firebuild_bootstrap.initramfs import Compression, initramfs_image
    from firebuild_bootstrap.sizes import human_size

    home = home_from(settings_from(config_file), writable=True)
    if output is not None:
        check_writable(output)
    path = initramfs_image(home.root, compression=Compression(compression), kernel_modules=kernel_modules)
    if output is not None:
        with open(path, "rb") as made, replaced(output) as file:  # no machine starts from a part of it
            shutil.copyfileobj(made, file)
        path = output
    click.echo(f"{one_line(str(path))}  {human_size(path.stat().st_size)}")
