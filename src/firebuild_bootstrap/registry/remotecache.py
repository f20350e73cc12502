"""A cache that machines share, in a registry, where its tag is replaced in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from firebuild_bootstrap.image.blobs import BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Descriptor, Manifest
from firebuild_bootstrap.image.remotecache import Fetch, cache_manifest
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.client import Repository
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.push import push


class RegistryBackend:
    """A cache in a registry; a `CacheBackend`. Mirrors are not asked: they may have an older one.

    Args:
        registries: how to get there.
        reference: its name.
        related: images and caches that may have some of its layers; where they are in the same registry, it
            takes the layers from there.
    """

    def __init__(
        self, registries: Registries, reference: Reference, related: Sequence[Reference] = ()
    ) -> None:
        self._registries = registries
        self._reference = reference
        self._related = related

    def __str__(self) -> str:
        return str(self._reference)

    def read(self, blobs: BlobStore) -> Manifest:
        """See `CacheBackend`: one request, and another one where the records are not here yet."""
        with self._registries.tasks.task(f"asking for the cache {self}"):
            repository = self._registries.repository(self._reference)
            received = repository.manifest(self._reference.digest or self._reference.tag)
            manifest = cache_manifest(received.data, received.media_type)
            self._fetch(repository, manifest.config, blobs, self._registries.around.check)
        return manifest

    def fetch(self, blob: Descriptor, blobs: BlobStore, check: Callable[[], None]) -> None:
        """See `CacheBackend`."""
        repository = self._registries.repository(self._reference)
        self._fetch(repository, blob, blobs, check, what=f"fetching a layer from the cache {self}")

    def write(self, manifest: Manifest, blobs: BlobStore, fetch: Fetch) -> None:
        """See `CacheBackend`: one request where it is there already."""
        repository = self._registries.repository(self._reference, push=True)
        try:
            if repository.digest(self._reference.tag) == manifest.digest:
                return
        except RegistryError as error:
            if error.status not in (401, 403, 404):
                raise
        push(self._registries, self._reference, manifest, blobs, related=self._related, fetch=fetch)

    def _fetch(
        self,
        repository: Repository,
        blob: Descriptor,
        blobs: BlobStore,
        check: Callable[[], None],
        *,
        what: str = "",
    ) -> None:
        with blobs.writer(blob) as writer, ExitStack() as showing:
            if not writer.complete:
                if what:
                    tasks = self._registries.tasks
                    showing.enter_context(tasks.task(what, total=blob.size, measure=lambda: writer.offset))
                repository.fetch(blob, writer, clock=self._registries.around.clock, check=check)
            writer.commit()
