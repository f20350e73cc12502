"""One repository of a registry: its manifests, blobs and tags, by the OCI distribution specification.

The numbers of end points (end-2 and so on) are those of the specification,
https://github.com/opencontainers/distribution-spec/blob/v1.1.0/spec.md#endpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final, Protocol
from urllib.parse import urlencode

from urllib3.exceptions import HTTPError

from firebuild_bootstrap.image.blobs import DIGEST, NOT_AS_ANNOUNCED, Described, digest_of
from firebuild_bootstrap.image.oci import ACCEPTED, MAX_DOCUMENT
from firebuild_bootstrap.registry.answers import (
    BEHIND_PROXY,
    SLOW,
    RegistryError,
    is_downgrade,
    shown_url,
)
from firebuild_bootstrap.registry.transport import STRANGER, Readable, Registry, Response
from firebuild_pki.addresses import joined
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_ACCEPT: Final = {"Accept": ", ".join(ACCEPTED)}
_RANGE: Final = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)")
_PIECE: Final = 1 << 16
# Less than this within the time that an answer may take is a connection that has died.
_LEAST: Final = 16 << 10


class Sink(Protocol):
    """Takes the bytes of a blob, and verifies them; `blobs.BlobWriter` is one."""

    offset: int

    def write(self, data: bytes, /) -> None:
        """Take the next bytes."""
        ...

    def restart(self) -> None:
        """Forget what is there."""
        ...


@dataclass(frozen=True)
class Received:
    """A manifest as it came: verified against its digest, if that was asked for, and not read yet.

    Args:
        data: its bytes.
        media_type: as the registry says.
    """

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        """`sha256:…` of its bytes."""
        return digest_of(self.data)


class Repository:
    """One repository.

    Args:
        registry: where it is.
        name: without the registry.
        push: whether something will be written there.
        also: repositories there that blobs are taken from.
    """

    def __init__(
        self, registry: Registry, name: str, *, push: bool = False, also: tuple[str, ...] = ()
    ) -> None:
        self.registry = registry
        self.name = name
        actions = "pull,push" if push else "pull"
        self._scopes = (f"repository:{name}:{actions}", *(f"repository:{other}:pull" for other in also))

    def __str__(self) -> str:
        return f"{self.registry.host}/{self.name}"

    # --- manifests ------------------------------------------------------------------------------

    def digest(self, reference: str) -> str:
        """Return the digest of a manifest by one HEAD request (end-3).

        Args:
            reference: a tag or digest.

        Raises:
            RegistryError: there is none, or the registry does not answer.
        """

        path, what = self.path(f"manifests/{reference}"), self._manifest(reference)

        def head() -> str:
            with self.send("HEAD", path, what, headers=_ACCEPT) as response:
                found: str = response.headers.get("Docker-Content-Digest", "")
                return found if DIGEST.fullmatch(found) else ""

        # The header is not required of registries.
        return self.registry.retry(head) or self.manifest(reference).digest

    def manifest(self, reference: str) -> Received:
        """Fetch a manifest (end-3); one that is asked for by digest is verified.

        Args:
            reference: a tag or digest.

        Raises:
            RegistryError: there is none, it is another one, or too long.
        """
        path, what = self.path(f"manifests/{reference}"), self._manifest(reference)

        def get() -> Received:
            with self.send("GET", path, what, headers=_ACCEPT) as response:
                if response.headers.get("Content-Type", "").startswith("text/html"):
                    raise RegistryError(f"{self.registry.host}: {what} is a web page", hint=STRANGER)
                announced = _length(response)
                if announced is not None and announced > MAX_DOCUMENT:
                    raise RegistryError(
                        f"{self.registry.host}: {what} has {counted(announced, 'byte')}, "
                        f"and {MAX_DOCUMENT} are allowed"
                    )
                data = self.registry.read(response, MAX_DOCUMENT, what)
                media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            return Received(data, media_type)

        found = self.registry.retry(get)
        if DIGEST.fullmatch(reference):
            actual = digest_of(found.data, reference.partition(":")[0])
            if actual != reference:
                raise RegistryError(
                    f"{self.registry.host}: expected {what}, received one with the digest {actual}",
                    hint=NOT_AS_ANNOUNCED,
                )
        return found

    def put_manifest(self, reference: str, manifest: Received) -> None:
        """Write a manifest under a tag or digest (end-7); what it names is there already.

        Raises:
            RegistryError: the registry refuses it, or stored something else.
        """
        path, what = self.path(f"manifests/{reference}"), f"pushing {self._manifest(reference)}"

        def put() -> None:
            headers = {"Content-Type": manifest.media_type}
            with self.send(
                "PUT", path, what, expected=(201, 200, 202), headers=headers, body=manifest.data
            ) as response:
                stored = response.headers.get("Docker-Content-Digest", manifest.digest)
                if stored.startswith("sha256:") and stored != manifest.digest:
                    raise RegistryError(
                        f"{self.registry.host}: {what}: it stored {one_line(stored, 100)} "
                        f"instead of {manifest.digest}"
                    )

        self.registry.retry(put)

    # --- blobs ----------------------------------------------------------------------------------

    def fetch(
        self, blob: Described, sink: Sink, *, clock: Callable[[], float], check: Callable[[], None]
    ) -> None:
        """Fetch what is missing of a blob (end-2), again from where it was cut off.

        Args:
            sink: whose offset is where to begin; verifies what it gets.
            clock: seconds that only grow.
            check: called at each piece; what it raises ends the work.

        Raises:
            RegistryError: the registry has no such blob, another one, or does not send it on.
            firebuild_bootstrap.image.blobs.BlobError: what it sends is too long.
        """
        path, what = self.path(f"blobs/{blob.digest}"), f"the blob {blob.digest} of {self.name}"

        def get() -> None:
            begin = sink.offset
            headers = {"Range": f"bytes={begin}-"} if begin else {}
            expected = (200, 206, 416) if begin else (200,)
            with self.send("GET", path, what, expected=expected, headers=headers) as response:
                if response.status == 416 or (response.status == 206 and _begin(response) != begin):
                    sink.restart()
                    raise RegistryError(
                        f"{self.registry.host}: {what}: it sent another part than was asked for", passing=True
                    )
                if response.status == 200 and begin:
                    sink.restart()  # it knows nothing of ranges
                announced = _length(response)
                if announced is not None and announced != blob.size - sink.offset:
                    raise RegistryError(
                        f"{self.registry.host}: {what} has {counted(announced + sink.offset, 'byte')} there, "
                        f"and its manifest says {blob.size}"
                    )
                self._receive(response, sink, what, clock, check)
                if sink.offset < blob.size:
                    raise RegistryError(
                        f"{self.registry.host}: {what} was cut off "
                        f"after {sink.offset} of {counted(blob.size, 'byte')}",
                        passing=True,
                    )

        if sink.offset < blob.size or blob.size == 0:
            self.registry.retry(get, lambda: sink.offset)

    def _receive(
        self,
        response: Response,
        sink: Sink,
        what: str,
        clock: Callable[[], float],
        check: Callable[[], None],
    ) -> None:
        end, before = clock() + self.registry.seconds, sink.offset
        while chunk := self._piece(response, what):
            sink.write(chunk)
            check()
            if clock() > end:
                if sink.offset - before < _LEAST:
                    raise RegistryError(
                        f"{self.registry.host}: {what} arrives too slowly", hint=SLOW, passing=True
                    )
                end, before = clock() + self.registry.seconds, sink.offset

    def _piece(self, response: Response, what: str) -> bytes:
        # What the sink raises, such as a full disk, does not mean that the connection failed.
        try:
            return response.read1(_PIECE, decode_content=False)
        except (HTTPError, OSError) as error:
            raise self.registry.failed(error, what) from None

    def has(self, blob: Described) -> bool:
        """Tell whether the registry has a blob (end-2 with HEAD).

        Raises:
            RegistryError: it does not answer that.
        """

        def head() -> bool:
            path, what = self.path(f"blobs/{blob.digest}"), f"the blob {blob.digest} of {self.name}"
            with self.send("HEAD", path, what, expected=(200, 404)) as response:
                return response.status == 200

        return self.registry.retry(head)

    def mount(self, blob: Described, source: str) -> bool:
        """Take a blob from another repository of the registry (end-11); False where it does not do that.

        Raises:
            RegistryError: it refuses to take blobs at all.
        """
        path = self.path(f"blobs/uploads/?{urlencode({'mount': blob.digest, 'from': source})}")
        what = f"taking the blob {blob.digest} from {source} to {self.name}"

        def post() -> str:
            with self.send("POST", path, what, expected=(201, 202)) as response:
                return "" if response.status == 201 else self.location(response, what)

        upload = self.registry.retry(post)
        if upload:  # it has begun an upload instead, which nobody needs (end-13 is OPTIONAL)
            self._cancel(upload)
        return not upload

    def _cancel(self, upload: str) -> None:
        try:
            with self.send("DELETE", upload, "ending an upload", expected=(204, 202, 200)):
                pass
        except RegistryError:  # it forgets uploads by itself
            return

    def location(self, response: Response, what: str) -> str:
        """Return where an answer wants data to go: https, or where the registry itself is.

        Raises:
            RegistryError: it is neither.
        """
        url = joined(f"{self.registry.base}/v2/", response.headers.get("Location", ""))
        if is_downgrade(self.registry.base, url):
            raise RegistryError(
                f"{self.registry.host}: {what}: it sends data on to {shown_url(url)}, which is not https",
                hint=BEHIND_PROXY,
            )
        return url

    # --- requests -------------------------------------------------------------------------------

    def _manifest(self, reference: str) -> str:
        return f"the manifest of {self.name}{'@' if ':' in reference else ':'}{reference}"

    def path(self, below: str) -> str:
        """Return the path of something of this repository."""
        return f"/v2/{self.name}/{below}"

    def send(
        self,
        method: str,
        url: str,
        what: str,
        *,
        expected: tuple[int, ...] = (200,),
        headers: Mapping[str, str] | None = None,
        body: bytes | Readable | None = None,
    ) -> AbstractContextManager[Response]:
        """Send a request for this repository, see `Registry.send`."""
        return self.registry.send(
            method,
            url,
            scopes=self._scopes,
            expected=expected,
            headers=headers,
            body=body,
            repository=self.name,
            what=what,
        )


def _length(response: Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _begin(response: Response) -> int:
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(found[1]) if found else -1
