"""Provenance and SBOMs: `firebuild images provenance` and `sbom`, and the options that attest them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from firebuild_bootstrap.cli.options import complete_tags, config_option, stacked, watched
from firebuild_bootstrap.cli.output import as_text, print_json

if TYPE_CHECKING:
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.attestations import Attestations, Mode
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.store import StoredImage

# As `docker buildx build` has them.
attest_options = stacked(
    click.option(
        "--attest",
        multiple=True,
        metavar="type=provenance[,mode=min|max]|type=sbom",
        help="Attestation to push with the image: how it was built, or its packages (SBOM). Repeatable.",
    ),
    click.option(
        "--provenance",
        is_flag=False,
        flag_value="true",
        metavar="[=true|false|mode=min|mode=max]",
        help="The same as --attest type=provenance.",
    ),
    click.option(
        "--sbom",
        is_flag=False,
        flag_value="true",
        metavar="[=true|false]",
        help="The same as --attest type=sbom.",
    ),
)


@click.command()
@click.argument("tag", shell_complete=complete_tags)
@click.option(
    "--mode",
    type=click.Choice(["min", "max"]),
    default="max",
    show_default=True,
    help="min: without build arguments, labels, ids of secrets, and steps.",
)
@config_option
def provenance(tag: str, mode: str, config_file: Path | None) -> None:
    """Print how an image was built, as an unsigned in-toto statement with SLSA provenance."""
    from firebuild_bootstrap.image.attestations import Mode
    from firebuild_bootstrap.image.names import Reference

    with watched(config_file) as home:
        name = Reference.parse_tag(tag)
        image = home.images.inspect(name, hold=True)
        click.echo(provenance_text(home, image, name, Mode(mode)), nl=False)


@click.command()
@click.argument("tag", shell_complete=complete_tags)
@config_option
def sbom(tag: str, config_file: Path | None) -> None:
    """Print the packages in an image as a CycloneDX document, which is made once and kept."""
    from firebuild_bootstrap.image.names import Reference

    with watched(config_file) as home:
        image = home.images.inspect(Reference.parse_tag(tag), hold=True)
        print_json(packages_of(home, image))


def provenance_text(home: Home, image: StoredImage, name: Reference, mode: Mode | None = None) -> str:
    """Return the statement of provenance as the command prints it.

    Raises:
        InputError: the image has none.
        MachineError: it is damaged, or a layer can't be read.
    """
    from firebuild_bootstrap.image.attestations import PROVENANCE, Mode, provenance_of, statement

    predicate = provenance_of(image, mode or Mode.MAX)
    return as_text(statement([str(name)], home.image_id(image), PROVENANCE, predicate))


def packages_of(home: Home, image: StoredImage) -> dict[str, Any]:
    """Return the list of packages of an image, which is made unless it is there.

    Raises:
        InputError, MachineError: a layer is not there or can't be read.
    """
    from firebuild_bootstrap.errors import MachineError
    from firebuild_bootstrap.image.attestations import keep_sbom, sbom_of

    found = sbom_of(image)
    if found is None:
        from firebuild_bootstrap.image.sbom import make_sbom

        found = make_sbom(image, home.image_id(image), home.layers, home.trees)
        with suppress(MachineError):  # a store that is read-only: then it is made again
            keep_sbom(image.directory, found)
    return found


def attested_digests(home: Home, image: StoredImage, wanted: Attestations) -> dict[str, Any]:
    """Return `sha256:…` of what the commands above print, for `--metadata-file`."""
    from firebuild_bootstrap.image.attestations import has_provenance

    texts = {}
    if has_provenance(image.directory):
        texts["provenance"] = provenance_text(home, image, image.tag)
    if wanted.sbom:
        texts["sbom"] = as_text(packages_of(home, image))
    digests = {kind: hashlib.sha256(text.encode()).hexdigest() for kind, text in texts.items()}
    return {"attestations": {kind: f"sha256:{digest}" for kind, digest in digests.items()}} if digests else {}


def statements_about(
    home: Home, image: StoredImage, names: Sequence[str], digest: str, wanted: Attestations
) -> list[dict[str, Any]]:
    """Return the statements that go out with an image.

    Args:
        names: of the image, as they go into the statements.
        digest: `sha256:…` of its manifest.
        wanted: which ones.

    Raises:
        InputError, MachineError: one can't be made.
    """
    from firebuild_bootstrap.image.attestations import PROVENANCE, SBOM, provenance_of, statement

    found = []
    if wanted.provenance is not None:
        found.append(statement(names, digest, PROVENANCE, provenance_of(image, wanted.provenance)))
    if wanted.sbom:
        found.append(statement(names, digest, SBOM, packages_of(home, image)))
    return found
