"""Pushing an image: what the registry does not have yet of its blobs, then its manifest under its tag.

The order is that of the distribution specification ("Push"): a manifest whose blobs are not there is refused.
The numbers of end points are its own, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from firebuild_bootstrap.image.attestations import Attested
from firebuild_bootstrap.image.blobs import BlobStore, Described
from firebuild_bootstrap.image.names import Reference
from firebuild_bootstrap.image.oci import Descriptor, Manifest
from firebuild_bootstrap.registry.answers import RegistryError
from firebuild_bootstrap.registry.client import Received, Repository
from firebuild_bootstrap.registry.pull import Registries
from firebuild_bootstrap.registry.transport import Response
from firebuild_bootstrap.transfers import side_by_side
from firebuild_pki.display import counted

_UPLOADED: Final = re.compile(r"(?:bytes=)?0-(\d{1,18})")
_BYTES: Final = {"Content-Type": "application/octet-stream"}
# What whoever refuses a whole blob is offered: chunks of 64 MiB, then 16, 4 and 1.
_LARGE_CHUNK: Final = 64 << 20
_SMALL_CHUNK: Final = 1 << 20


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
                Upload(repository, blob, path, lambda size: sent.__setitem__(0, size), check).send()

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


class Upload:
    """One blob on its way: whole after a POST (end-4a, end-6), or in chunks (end-5).

    Chunks are sent where the settings say so, or where the whole is refused as too large. What was cut off
    goes on where the registry has got to (end-13).

    Args:
        repository: where it goes.
        blob: what it is.
        path: its content.
        count: told how many bytes have been sent of it.
        check: called at each piece; what it raises ends the work.
    """

    def __init__(
        self,
        repository: Repository,
        blob: Described,
        path: Path,
        count: Callable[[int], None],
        check: Callable[[], None],
    ) -> None:
        self.offset = 0
        """Bytes that the registry says to have."""
        self._repository = repository
        self._blob = blob
        self._path = path
        self._count = count
        self._check = check
        self._what = f"pushing the blob {blob.digest} to {repository.name}"
        self._url = ""
        self._resumed = False
        self._chunk = repository.registry.chunk_size
        self._least = 0  # bytes of a chunk that the registry wants at least

    def send(self) -> None:
        """Send it, again after a while where that may help.

        Raises:
            RegistryError: the registry refuses it, or its connections break.
        """
        self._repository.registry.retry(self._send, lambda: self.offset)

    def _send(self) -> None:
        if self._url:
            self._resume()
            if not self._url and self._repository.has(self._blob):  # only its last answer was lost
                return
        while True:
            if not self._url:
                self._begin()
            try:
                while self._chunk and self._blob.size - self.offset > self._chunk:
                    self._patch()
                self._put()
            except RegistryError as error:
                # It has other bytes than it said, or none: docker-registry gives up an upload that was cut
                # off only when it comes to notice, perhaps after it was asked.
                if self._resumed and error.status in (400, 404, 416):
                    self._forget()
                elif error.status == 413 and self._smaller():
                    self._resume()
                else:
                    raise
            else:
                return

    def _begin(self) -> None:
        path = self._repository.path("blobs/uploads/")
        with self._repository.send("POST", path, self._what, expected=(202,)) as response:
            self._url = self._repository.location(response, self._what)
            least = response.headers.get("OCI-Chunk-Min-Length", "")
        self._least = int(least) if re.fullmatch("[0-9]{1,12}", least) else 0
        self._chunk = self._chunk and max(self._chunk, self._least)

    def _resume(self) -> None:
        """Ask how much the registry has; where it does not know, the upload starts again."""
        try:
            with self._repository.send("GET", self._url, self._what, expected=(204, 200, 202)) as response:
                has = _received(response)
                self._url = self._repository.location(response, self._what)
        except RegistryError as error:
            if error.passing:
                raise
            has = 0
        # Some say 0-0 for nothing as well as for one byte.
        if 1 < has <= self._blob.size:
            self.offset, self._resumed = has, True
        else:
            self._forget()

    def _forget(self) -> None:
        self._url, self.offset, self._resumed = "", 0, False

    def _patch(self) -> None:
        size = self._chunk
        headers = self._headers(size)
        with self._sent("PATCH", self._url, size, headers, expected=(202, 204, 201)) as response:
            self._url = self._repository.location(response, self._what)
            has = _received(response) or self.offset + size
        if not self.offset < has <= self.offset + size:
            raise RegistryError(
                f"{self._repository.registry.host}: {self._what}: it has {counted(has, 'byte')}, "
                f"and {self.offset + size} were sent"
            )
        self.offset = has

    def _put(self) -> None:
        parts = urlsplit(self._url)
        query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", self._blob.digest)])
        size = self._blob.size - self.offset
        headers = self._headers(size) if self.offset and size else _BYTES | {"Content-Length": str(size)}
        with self._sent("PUT", parts._replace(query=query).geturl(), size, headers, expected=(201, 204)):
            pass

    def _headers(self, size: int) -> dict[str, str]:
        place = {"Content-Length": str(size), "Content-Range": f"{self.offset}-{self.offset + size - 1}"}
        return _BYTES | place

    @contextmanager
    def _sent(
        self, method: str, url: str, size: int, headers: Mapping[str, str], *, expected: tuple[int, ...]
    ) -> Iterator[Response]:
        with open(self._path, "rb") as file:
            file.seek(self.offset)
            body = _Counted(file, size, lambda sent: self._count(self.offset + sent), self._check)
            with self._repository.send(
                method, url, self._what, expected=expected, headers=headers, body=body
            ) as response:
                yield response

    def _smaller(self) -> bool:
        """Choose smaller chunks, as whoever is in front of the registry may take; False for none."""
        size = min(self._chunk or self._blob.size, 4 * _LARGE_CHUNK) // 4
        if size < max(_SMALL_CHUNK, self._least):
            return False
        self._chunk = size
        return True


def _received(response: Response) -> int:
    """Return how many bytes of an upload a registry has: its header is `0-LAST`, without a unit."""
    found = _UPLOADED.fullmatch(response.headers.get("Range", ""))
    return int(found[1]) + 1 if found else 0


class _Counted:
    """A part of a file that tells how much of it was read."""

    def __init__(
        self, file: IO[bytes], size: int, count: Callable[[int], None], check: Callable[[], None]
    ) -> None:
        self._file = file
        self._size = size
        self._count = count
        self._check = check
        self._read = 0

    def read(self, size: int = -1) -> bytes:
        self._check()
        left = self._size - self._read
        data = self._file.read(left if size < 0 else min(size, left))
        self._read += len(data)
        self._count(self._read)
        return data
