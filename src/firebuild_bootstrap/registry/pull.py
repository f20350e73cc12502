"""Pulling an image: its manifest, its configuration, its layers, from a registry or one of its mirrors.

What was pulled once is in the store of blobs by its digest, and is not fetched again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.image.blobs import BlobError, BlobStore
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import (
    MAX_DOCUMENT,
    Descriptor,
    ImageDocument,
    Manifest,
    check_image,
    choose_image,
    parse_config,
    parse_manifest,
)
from firebuild_bootstrap.image.platforms import Platform
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.client import Received, Repository
from firebuild_bootstrap.registry.credentials import HUB
from firebuild_bootstrap.registry.transport import Registry, Surroundings
from firebuild_bootstrap.transfers import Job, answer_of, side_by_side
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

T = TypeVar("T")

_OFFICIAL: Final = "library/"
_PAUSE: Final = 0.1


@dataclass(frozen=True)
class Pulled:
    """An image whose blobs are in the store, held there.

    Args:
        digest: what its tag names at the registry: of the manifest, or of an index with it.
        manifest: for one platform.
        document: its configuration.
    """

    digest: str
    manifest: Manifest
    document: ImageDocument


class Registries:
    """The registries that images are pulled from and pushed to.

    Args:
        around: settings, environment and the like.
        tasks: told of all that may take a while, and of mirrors that fail.
    """

    def __init__(self, around: Surroundings, tasks: Tasks) -> None:
        self.around = around
        self.tasks = tasks
        self._known: dict[str, Registry] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all connections; what is asked from now on opens new ones."""
        for registry in self._known.values():
            registry.close()

    def registry(self, host: str) -> Registry:
        """Return a registry by its name, HOST[:PORT]."""
        with self._lock:
            if host not in self._known:
                self._known[host] = Registry(host, self.around)
            return self._known[host]

    def place(self, reference: Reference) -> tuple[str, str]:
        """Return the registry that a reference means, and the repository there."""
        settings = self.around.settings
        host, path = reference.registry, reference.repository
        if host != HUB:
            return host, path
        short = path.removeprefix(_OFFICIAL)
        if "/" not in short:
            path = f"{settings.namespace}/{short}".removeprefix("/")
        return settings.default, path

    def repository(self, reference: Reference, *, push: bool = False, also: Sequence[str] = ()) -> Repository:
        """Return the repository that a reference means, no mirror."""
        host, path = self.place(reference)
        return Repository(self.registry(host), path, push=push, also=tuple(also))

    def sources(self, reference: Reference) -> Iterator[Repository]:
        """Yield the repositories to pull from: the mirrors in order, the registry itself last."""
        host, path = self.place(reference)
        for mirror in self.around.settings.of(host).mirrors:
            name, _, prefix = mirror.partition("/")
            yield Repository(self.registry(name), f"{prefix}/{path}".removeprefix("/"))
        yield Repository(self.registry(host), path)

    # --- pulling --------------------------------------------------------------------------------

    def digest(self, reference: Reference) -> str:
        """Return what a tag names at the registry, by one request.

        Raises:
            RegistryError: it has no such tag, or does not answer.
        """
        with self.tasks.task(f"asking for {reference}"):
            wanted = _wanted(reference)
            return self._first(
                list(self.sources(reference)), lambda one: self._answer(partial(one.digest, wanted))
            )[1]

    def pull(self, reference: Reference, blobs: BlobStore, platform: Platform, *, digest: str = "") -> Pulled:
        """Fetch an image, or what is missing of it.

        Args:
            reference: its tag, or its digest.
            blobs: keeps what comes.
            platform: which image of an index.
            digest: what the tag names, where that is known.

        Raises:
            RegistryError: no registry has it, or can be asked.
            InputError: it has no image for this platform, or not what its digest says.
            MachineError: the store can't be written.
        """
        return self.pull_several([reference], blobs, platform, digests={reference: digest})[0]

    def pull_several(
        self,
        references: Sequence[Reference],
        blobs: BlobStore,
        platform: Platform,
        *,
        digests: Mapping[Reference, str] | None = None,
    ) -> list[Pulled]:
        """Fetch images as `pull` does, the layers of all of them side by side.

        Args:
            digests: what tags name, where that is known.
        """
        digests = digests or {}
        known = [self._described(each, blobs, platform, digests.get(each, "")) for each in references]
        blobs.make_room([layer for _, pulled in known for layer in pulled.manifest.layers])
        jobs = dict[str, Job]()
        for reference, (sources, pulled) in zip(references, known, strict=True):
            layers = list({layer.digest: layer for layer in pulled.manifest.layers}.values())
            for number, layer in enumerate(layers, 1):
                what = f"pulling {reference}, layer {number} of {len(layers)}"
                jobs.setdefault(layer.digest, partial(self._fetch, sources, layer, blobs, what))
        side_by_side(list(jobs.values()), self.around.settings.connections, self.around.check)
        return [pulled for _, pulled in known]

    def _described(
        self, reference: Reference, blobs: BlobStore, platform: Platform, digest: str
    ) -> tuple[list[Repository], Pulled]:
        """Fetch what says which layers an image has; returns where these are worth asking for, too."""
        try:
            return self._chosen(reference, blobs, platform, digest)
        except RegistryError:  # says what was asked for
            raise
        except InputError as error:
            raise InputError(f"{reference}: {error.message}", hint=error.hint) from error

    def _chosen(
        self, reference: Reference, blobs: BlobStore, platform: Platform, digest: str
    ) -> tuple[list[Repository], Pulled]:
        sources = list(self.sources(reference))
        with self.tasks.task(f"asking for {reference}"):
            wanted = digest or _wanted(reference)
            sources, received = self._manifest(sources, wanted, blobs)
            top = wanted if ":" in wanted else received.digest
            manifest, _ = choose_image(
                parse_manifest(received.data, received.media_type),
                platform,
                lambda entry: self._manifest(sources, entry.digest, blobs)[1].data,
            )
            if manifest.config.size > MAX_DOCUMENT:
                raise InputError(f"its configuration has {counted(manifest.config.size, 'byte')}")
            answer_of(partial(self._fetch, sources, manifest.config, blobs, ""), self.around.check)
            document = parse_config(blobs.read(manifest.config.digest, MAX_DOCUMENT))
        check_image(manifest, document, platform)
        return sources, Pulled(top, manifest, document)

    def _manifest(
        self, sources: list[Repository], wanted: str, blobs: BlobStore
    ) -> tuple[list[Repository], Received]:
        if ":" in wanted and blobs.hold(wanted) is not None:
            return sources, Received(blobs.read(wanted, MAX_DOCUMENT), "")
        rest, received = self._first(sources, lambda one: self._answer(partial(one.manifest, wanted)))
        blobs.add(received.data)
        return rest, received

    def _fetch(
        self,
        sources: list[Repository],
        blob: Descriptor,
        blobs: BlobStore,
        what: str,
        check: Callable[[], None],
    ) -> None:
        with blobs.writer(blob) as writer:

            def fetch(one: Repository) -> None:
                one.fetch(blob, writer, clock=self.around.clock, check=check)
                writer.commit()

            if writer.complete:
                with suppress(BlobError):
                    writer.commit()
                    return
            if not what:
                self._first(sources, fetch)
                return
            with self.tasks.task(what, total=blob.size, measure=lambda: writer.offset):
                self._first(sources, fetch)

    def _answer(self, ask: Callable[[], T]) -> T:
        """Return what a registry answers; an interruption does not wait for one that is silent."""
        return answer_of(lambda _: ask(), self.around.check)

    def _first(self, sources: list[Repository], ask: Callable[[Repository], T]) -> tuple[list[Repository], T]:
        """Return what the first source answers, and from which on they are worth asking."""
        for place, source in enumerate(sources):
            try:
                return sources[place:], ask(source)
            except (RegistryError, BlobError) as error:
                if place + 1 == len(sources):
                    raise
                self._tell(source, sources[place + 1], error)
        raise AssertionError("there is always the registry itself")

    def _tell(self, mirror: Repository, other: Repository, error: InputError) -> None:
        with self._lock:
            told = mirror.registry.host in self._told
            self._told.add(mirror.registry.host)
        if not told:
            self.tasks.warn(
                f"{mirror.registry.host} failed, {other.registry.host} is asked instead: "
                f"{one_line(error.message)}"
            )


def connected(settings: Any, check: Callable[[], None], tasks: Tasks) -> Registries:
    """Return the registries as the settings of a build have them, which the caller closes.

    Args:
        settings: the whole settings, for their sections `registries` and `ca`.
        check: called again and again; what it raises ends the work.
        tasks: as for `Registries`.
    """
    from firebuild_bootstrap.registry.tls import ca_anchors

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            check()
            time.sleep(min(left, _PAUSE))

    around = Surroundings(
        settings=settings.registries,
        environ=os.environ,
        anchors=lambda: ca_anchors(settings.ca, check=check, report=tasks.warn),
        check=check,
        pause=pause,
    )
    return Registries(around, tasks)


def _wanted(reference: Reference) -> str:
    return reference.digest or reference.tag
