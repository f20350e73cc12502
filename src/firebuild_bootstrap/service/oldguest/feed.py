"""The contents of a COPY or ADD in the order of its files, piece by piece, across several calls."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from firebuild_bootstrap import wire
from firebuild_bootstrap.context.entries import Entry, Resource
from firebuild_bootstrap.service.resources import changed, content_of, reading


class Feed:
    """Reads a resource for the second time: the first time told what there is.

    Args:
        resource: yields its entries anew.
        planned: what it yielded the first time.
    """

    def __init__(self, resource: Resource, planned: Sequence[Entry]) -> None:
        self._entries = resource.entries()
        self._planned = planned
        self._next = 0
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self.digests: dict[int, str] = {}

    def piece(self, index: int, size: int, *, last: bool) -> Iterator[bytes]:
        """Yield the next `size` bytes of a file in chunks.

        Args:
            index: number of the file's entry; never lower than the one before.
            size: bytes of the piece.
            last: the file ends with it; its digest is in `digests` then.

        Raises:
            InputError: a source has vanished, cannot be read or has changed.
        """
        if self._file is None:
            self._file = self._open(index)
        entry = self._planned[index]
        with reading(entry):
            while size:
                data = self._file.read(min(size, wire.CHUNK_BYTES))
                if not data:
                    raise changed(entry, "it has become shorter")
                self._hash.update(data)
                size -= len(data)
                yield data
            if last:
                if self._file.read(1):
                    raise changed(entry, "it has become longer")
                self.digests[index] = self._hash.hexdigest()
                self._close_file()

    def _open(self, index: int) -> BinaryIO:
        self._hash = hashlib.sha256()
        while True:
            entry, planned = next(self._entries, None), self._planned[self._next]
            if entry is None or _facts(entry) != _facts(planned):
                raise changed(planned, "there is something else now")
            self._next += 1
            if self._next > index:
                return content_of(entry)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Let go of what is open."""
        self._close_file()
        close = getattr(self._entries, "close", None)
        if close is not None:
            close()


def _facts(entry: Entry) -> tuple[object, ...]:
    return (entry.source, entry.path, entry.kind, entry.mode, entry.size, entry.link_target, entry.owner)
