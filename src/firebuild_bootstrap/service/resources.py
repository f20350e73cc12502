"""One COPY or ADD as a stream of chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry, EntryKind, Resource, plain
from firebuild_bootstrap.errors import InputError

_KINDS: Final = {
    EntryKind.FILE: pb.ENTRY_KIND_FILE,
    EntryKind.DIRECTORY: pb.ENTRY_KIND_DIRECTORY,
    EntryKind.SYMLINK: pb.ENTRY_KIND_SYMLINK,
    EntryKind.HARDLINK: pb.ENTRY_KIND_HARDLINK,
}


@dataclass(frozen=True)
class Delivery:
    """A resource with the command that asks for it, for a guest that knows the extensions."""

    resource: Resource
    command: wire.CopyCommand

    def chunks(self) -> Iterator[pb.ResourceChunk]:
        """Yield a header, the content, and an end for each entry; at most one chunk is in memory.

        Raises:
            InputError: a file has vanished, cannot be read or has changed.
        """
        for number, entry in enumerate(plain(self.resource.entries()), start=1):
            identity = f"{self.command.source}-{number}"
            content = _content(entry) if entry.kind is EntryKind.FILE else ()
            yield from messages(self._header(entry, identity), content)

    def _header(self, entry: Entry, identity: str) -> pb.ResourceChunk.ResourceHeader:
        owner = self.command.chown or "0:0"
        if entry.owner is not None:
            owner = f"{entry.owner[0]}:{entry.owner[1]}"
        return pb.ResourceChunk.ResourceHeader(
            sourcePath=entry.source,
            targetPath=self.command.target,
            targetWorkdir=self.command.workdir,
            fileMode=entry.mode,
            isDir=entry.kind is EntryKind.DIRECTORY,
            targetUser=owner,
            id=identity,
            kind=_KINDS[entry.kind],
            entryPath=entry.path,
            linkTarget=entry.link_target,
            size=entry.size,
            mtimeNs=entry.mtime_ns,
            fromDirectory=entry.from_directory,
            keepOwner=entry.owner is not None,
            ofTree=entry.owner is not None and not entry.member,
            uid=entry.owner[0] if entry.owner else 0,
            gid=entry.owner[1] if entry.owner else 0,
        )


def messages(header: pb.ResourceChunk.ResourceHeader, content: Iterable[bytes]) -> Iterator[pb.ResourceChunk]:
    """Yield the messages of one entry: its header, its content with checksums, and its end."""
    yield pb.ResourceChunk(header=header)
    for data in content:
        yield pb.ResourceChunk(
            chunk=pb.ResourceChunk.ResourceContents(chunk=data, checksum=wire.checksum(data), id=header.id)
        )
    yield pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id=header.id))


@contextmanager
def reading(entry: Entry) -> Iterator[None]:
    """Turn what goes wrong with the content of a file into words.

    Raises:
        InputError: in place of the errors of the system.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{entry.source} has vanished since the build began") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{entry.source} cannot be read: {error}") from error


def content_of(entry: Entry) -> BinaryIO:
    """Open the content of a file.

    Raises:
        InputError: it has none, or cannot be opened.
    """
    if entry.open is None:
        raise InputError(f"{entry.source}: a file without content cannot be sent")
    with reading(entry):
        return entry.open()


def changed(entry: Entry, how: str) -> InputError:
    """Return the error for a file that is not what it was when the build began."""
    return InputError(
        f"{entry.source} has changed while it was sent: {how}",
        hint="do not change the build context during a build",
    )


def _content(entry: Entry) -> Iterator[bytes]:
    sent = 0
    with content_of(entry) as file, reading(entry):
        while data := file.read(wire.CHUNK_BYTES):
            sent += len(data)
            yield data
    if sent != entry.size:
        raise changed(entry, f"expected {entry.size} bytes, found {sent}")
