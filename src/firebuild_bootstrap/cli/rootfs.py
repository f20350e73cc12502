"""`firebuild rootfs`: the main job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.options import config_option, home_from, settings_from

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.progress import ProgressMode, Renderer
    from firebuild_bootstrap.request import BuildRequest
    from firebuild_bootstrap.settings import BuildSettings


@click.command()
@click.option(
    "--dockerfile",
    type=click.Path(path_type=Path),
    show_default="Dockerfile in the context",
    help="What to build.",
)
@click.option(
    "--context",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="the current directory",
    help="Directory that COPY and ADD read from.",
)
@click.option("--tag", required=True, metavar="ORG/NAME:VERSION", help="What to store the image as.")
@click.option("--build-arg", "build_args", multiple=True, metavar="NAME[=VALUE]", help="Value for an ARG.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="Label for the image.")
@click.option("--target", metavar="STAGE", help="Stage to build; the last one by default.")
@click.option(
    "--output",
    "outputs",
    multiple=True,
    metavar="TYPE[,dest=PATH]",
    help="ext4 (default), tar or dir; repeatable. dest: also write it there.",
)
@click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "rawjson"]),
    default="auto",
    show_default=True,
    help="Live on a terminal and plain in a pipe, always plain, or one JSON event a line.",
)
@click.option(
    "--metadata-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write what `firebuild images inspect` shows to this file.",
)
@click.option(
    "--keep-on-failure",
    "keep_failed",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Keep what is left of a failed build in DIR/BUILD-ID; DIR is `failed` in the store by default.",
)
@click.option("--ca", metavar="PROVIDER", help="CA provider to use instead of the configured one.")
@click.option("--machine", metavar="DRIVER", help="Machine driver to use instead of the configured one.")
@config_option
def rootfs(
    progress: ProgressMode,
    metadata_file: Path | None,
    ca: str | None,
    machine: str | None,
    config_file: Path | None,
    **options: Any,
) -> None:
    """Build a root file system from a Dockerfile and store it as an image."""
    from firebuild_bootstrap.interrupts import Interrupts

    interrupts = Interrupts()
    with interrupts.installed():
        from firebuild_bootstrap.build import build_image
        from firebuild_bootstrap.cli.imagejson import check_writable, image_json, write_atomically
        from firebuild_bootstrap.machine.drivers import check_stores_images

        chosen = {"ca.provider": ca, "machine.driver": machine}
        settings = settings_from(config_file, {name: value for name, value in chosen.items() if value})
        home = home_from(settings, check=interrupts.check)
        request = _request(options, home)
        if metadata_file is not None:
            check_stores_images(settings.machine, "--metadata-file")
            check_writable(metadata_file)
        with closing(home), closing(_renderer(progress, settings)) as renderer:
            image = build_image(request, settings, home, events=renderer)
        if metadata_file is not None and image is not None:
            write_atomically(metadata_file, image_json(image))


def _renderer(progress: ProgressMode, settings: BuildSettings) -> Renderer:
    """Show events on standard output, or beside it where that carries the guest's metadata."""
    from firebuild_bootstrap.machine.drivers import metadata_on_stdout
    from firebuild_bootstrap.progress import make_renderer

    out = sys.stderr if metadata_on_stdout(settings.machine) else sys.stdout
    return make_renderer(progress, out.buffer, terminal=out.isatty())


def _request(options: dict[str, Any], home: Home) -> BuildRequest:
    from firebuild_bootstrap.dockerfile import parse_assignments
    from firebuild_bootstrap.image.names import ImageTag
    from firebuild_bootstrap.image.outputs import parse_outputs
    from firebuild_bootstrap.request import BuildRequest

    labels = parse_assignments(options["labels"], "--label")
    return BuildRequest(
        dockerfile=options["dockerfile"] or options["context"] / "Dockerfile",
        context=options["context"],
        tag=ImageTag.parse(options["tag"]),
        build_args=_from_environment(parse_assignments(options["build_args"], "--build-arg")),
        labels={name: value or "" for name, value in labels.items()},
        target=options["target"],
        outputs=parse_outputs(options["outputs"]),
        keep_failed=_keep_failed(options["keep_failed"], home),
    )


def _keep_failed(given: str | None, home: Home) -> Path | None:
    """Return the directory that `--keep-on-failure` means; the option alone means one in the store."""
    if given is None:
        return None
    return Path(given).absolute() if given else home.root / "failed"


def _from_environment(given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Let `--build-arg NAME` take its value from the environment, as `docker build` does."""
    return {name: os.environ.get(name) if value is None else value for name, value in given.items()}
