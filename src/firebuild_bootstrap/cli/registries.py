"""How the command line pulls the images that FROM names, and pushes those that were built."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.sizes import parse_bool

if TYPE_CHECKING:
    from firebuild_bootstrap.events import Tasks
    from firebuild_bootstrap.home import Home
    from firebuild_bootstrap.image.attestations import Attestations
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.outputs import Compression
    from firebuild_bootstrap.image.store import StoredImage
    from firebuild_bootstrap.registry.pull import Registries
    from firebuild_bootstrap.settings import BuildSettings


def read_policy(given: str | None) -> str | None:
    """Read `--pull` or FIREBUILD_PULL: missing, always or never, or as Docker's flag; None for neither.

    Raises:
        InputError: it is something else.
    """
    if given is None or given in ("missing", "always", "never"):
        return given
    always = True if given == "" else parse_bool(given)
    if always is None:
        where = "FIREBUILD_PULL" if given == os.environ.get("FIREBUILD_PULL") else "--pull"
        raise InputError(f"{where}: expected missing, always or never, found {given!r:.100}")
    return "always" if always else "missing"


def puller(settings: BuildSettings) -> Callable[[Home, Reference], StoredImage]:
    """Return what pulls an image into a store; its connections and logins serve all of one build."""
    known: list[tuple[Home, Registries]] = []

    def pull(home: Home, wanted: Reference) -> StoredImage:
        from firebuild_bootstrap.image.platforms import Platform
        from firebuild_bootstrap.registry.pull import connected

        if not known or known[-1][0] is not home:
            known.append((home, connected(settings, home.check, home.tasks)))
        with closing(known[-1][1]) as registries:
            digest = wanted.digest
            there = home.images.find(wanted, hold=True)
            if there is not None and there.record.source is not None and not digest:
                digest = registries.digest(wanted)
                same = there.record.source.pulled and digest == there.record.source.digests[0]
                if same and home.intake.has_all_blobs(there):
                    return there
            pulled = registries.pull(wanted, home.blobs, Platform.host(), digest=digest)
        # What is named by its digest is not the newest of its tag.
        tags = () if wanted.digest else (wanted,)
        return home.intake.take_in(
            tags,
            pulled.manifest,
            pulled.document,
            digests=(pulled.digest,),
            origin=str(registries.repository(wanted)),
            pulled=True,
        )

    return pull


def prefetch(settings: BuildSettings, home: Home, wanted: Sequence[Reference]) -> None:
    """Bring what is missing of several images into the store of blobs, side by side, for `puller`.

    Raises:
        InputError: one is not there, or can't be used here; none is pulled then.
        MachineError: the store can't be written.
    """
    from firebuild_bootstrap.image.platforms import Platform
    from firebuild_bootstrap.registry.pull import connected

    with closing(connected(settings, home.check, home.tasks)) as registries:
        registries.pull_several(list(dict.fromkeys(wanted)), home.blobs, Platform.host())


def push_image(
    settings: BuildSettings,
    home: Home,
    image: StoredImage,
    tags: Sequence[Reference],
    tasks: Tasks,
    *,
    attestations: Attestations,
    compression: Compression | None = None,
    related: Sequence[Reference] = (),
) -> Iterator[tuple[Reference, str]]:
    """Push an image under its tags, with what is said about it, if that is wanted.

    Its layers are compressed with gzip unless something else is wanted.

    Args:
        related: caches that may have some of its layers in the same registry, as its base may.

    Yields:
        each tag that is at its registry now, with the digest of the manifest, or of the index that names the
        statements as well.

    Raises:
        InputError: a registry refuses it, or can't be asked.
        MachineError: a layer can't be read.
    """
    from firebuild_bootstrap.cli.accounting import statements_about
    from firebuild_bootstrap.image.attestations import attested, package_url
    from firebuild_bootstrap.image.names import Reference
    from firebuild_bootstrap.image.outputs import GZIP
    from firebuild_bootstrap.image.platforms import Platform
    from firebuild_bootstrap.registry.pull import connected
    from firebuild_bootstrap.registry.push import push

    with tasks.task("packing layers to push"):
        manifest = home.outgoing.manifest(image, compression or GZIP)
    platform = image.record.platform
    base = image.record.base
    related = (*((Reference.parse(base),) if base else ()), *related)
    with closing(connected(settings, home.check, tasks)) as registries:
        for tag in tags:
            about = None
            if attestations:
                name = package_url(tag.familiar, tag.tag, platform)
                made = statements_about(home, image, [name], manifest.digest, attestations)
                about = attested(manifest, Platform.parse(platform), made, home.blobs)
            yield tag, push(registries, tag, manifest, home.blobs, attested=about, related=related)
