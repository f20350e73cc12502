"""Pushing an image: what the registry does not have yet of its blobs, then its manifest under its tag.

The order is that of the distribution specification ("Push"): a manifest whose blobs are not there is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from firebuild_bootstrap.image.attestations import Attested
from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Descriptor, Manifest
from firebuild_bootstrap.registry.client import Received, Repository
from firebuild_bootstrap.registry.pull import Registries, side_by_side


def push(
    registries: Registries,
    reference: Reference,
    manifest: Manifest,
    blobs: BlobStore,
    *,
    attested: Attested | None = None,
    related: Sequence[Reference] = (),
    fetch: Callable[[Descriptor], Path] | None = None,
) -> str:
    """Push an image and return the digest of what its tag names: its manifest, or an index.

    Args:
        reference: under which tag.
        manifest: what it is.
        blobs: has its configuration and its layers.
        attested: what is said about it; the tag names the index of that then.
        related: images that may share layers with it, such as its base: if they are in the same registry,
            it takes the layers from there.
        fetch: brings a blob to the store that is not there, and that the registry does not have either.

    Raises:
        RegistryError: the registry refuses it, or can't be asked.
        MachineError: a blob is not in the store.
    """
    host, path = registries.place(reference)
    places = (registries.place(other) for other in related)
    also = tuple(dict.fromkeys(there for where, there in places if where == host and there != path))
    repository = registries.repository(reference, push=True, also=also)
    # Held by this thread: the threads below only read.
    manifests = (manifest,) if attested is None else (manifest, attested.attestation)
    needed = tuple({blob.digest: blob for each in manifests for blob in each.blobs}.values())
    take = blobs.required if fetch is None else blobs.hold
    paths = {blob.digest: take(blob.digest) for blob in needed}
    count = len(paths)

    def job(number: int, blob: Descriptor) -> Callable[[Callable[[], None]], None]:
        def send(check: Callable[[], None]) -> None:
            if repository.has(blob) or any(_mounted(repository, blob, source) for source in also):
                return
            path = paths[blob.digest] or (fetch(blob) if fetch is not None else blobs.required(blob.digest))
            sent = [0]
            what = f"pushing {reference}, blob {number} of {count}"
            with registries.tasks.task(what, total=blob.size, measure=lambda: sent[0]):
                repository.upload(blob, path, lambda size: sent.__setitem__(0, size), check)

        return send

    jobs = [job(number, blob) for number, blob in enumerate(needed, 1)]
    side_by_side(jobs, registries.around.settings.connections, registries.around.check)
    with registries.tasks.task(f"pushing the manifest of {reference}"):
        if attested is None:
            repository.put_manifest(reference.tag, Received(manifest.data, manifest.media_type))
            return manifest.digest
        for each in manifests:
            repository.put_manifest(each.digest, Received(each.data, each.media_type))
        repository.put_manifest(reference.tag, Received(attested.index.data, attested.index.media_type))
        return attested.index.digest


def _mounted(repository: Repository, blob: Descriptor, source: str) -> bool:
    # A mount of what the source does not have begins an upload: asked for only where it helps.
    there = Repository(repository.registry, source)
    return there.has(blob) and repository.mount(blob, source)
