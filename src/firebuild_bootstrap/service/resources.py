"""One COPY or ADD as a stream of chunks, for guests of every age."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import Entry, EntryKind, Resource
from firebuild_bootstrap.errors import InputError

_KINDS: Final = {
    EntryKind.FILE: pb.ENTRY_KIND_FILE,
    EntryKind.DIRECTORY: pb.ENTRY_KIND_DIRECTORY,
    EntryKind.SYMLINK: pb.ENTRY_KIND_SYMLINK,
    EntryKind.HARDLINK: pb.ENTRY_KIND_HARDLINK,
}


@dataclass(frozen=True)
class Delivery:
    """A resource with the command that asks for it, which tells where it goes."""

    resource: Resource
    command: wire.CopyCommand

    def chunks(self, *, extended: bool) -> Iterator[pb.ResourceChunk]:
        """Yield a header, the content, and an end for each entry; at most one chunk is in memory.

        Args:
            extended: the guest understands links; an old one would write empty files in their place.

        Raises:
            InputError: a file has vanished, cannot be read, has changed, or is a link for an old guest.
        """
        for number, entry in enumerate(self.resource.entries(), start=1):
            if not extended and entry.kind in (EntryKind.SYMLINK, EntryKind.HARDLINK):
                raise InputError(
                    f"{entry.source} is a link, and the guest's vminit is too old to create links",
                    hint="use a current vminit, or copy the file that the link points to",
                )
            identity = f"{self.command.source}-{number}"
            yield pb.ResourceChunk(header=self._header(entry, identity))
            if entry.kind is EntryKind.FILE:
                yield from _content(entry, identity)
            yield pb.ResourceChunk(eof=pb.ResourceChunk.ResourceEof(id=identity))

    def _header(self, entry: Entry, identity: str) -> pb.ResourceChunk.ResourceHeader:
        place = self._place(entry)
        owner = self.command.chown or "0:0"
        if entry.owner is not None:
            owner = f"{entry.owner[0]}:{entry.owner[1]}"
        return pb.ResourceChunk.ResourceHeader(
            # An old guest puts a file below the target unless both base names are equal, and joins even
            # an absolute target to the directory: these values make it end up at the right place.
            sourcePath=place,
            targetPath=place,
            targetWorkdir="/",
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
            uid=entry.owner[0] if entry.owner else 0,
            gid=entry.owner[1] if entry.owner else 0,
        )

    def _place(self, entry: Entry) -> str:
        target = posixpath.join("/", self.command.workdir, self.command.target)
        into_directory = self.command.target_is_directory or self.command.target.endswith("/")
        if entry.from_directory:
            target = posixpath.join(target, entry.path)
        elif into_directory:
            target = posixpath.join(target, posixpath.basename(entry.path or entry.source))
        return posixpath.normpath(target)


def _content(entry: Entry, identity: str) -> Iterator[pb.ResourceChunk]:
    if entry.open is None:
        raise InputError(f"{entry.source}: a file without content cannot be sent")
    sent = 0
    try:
        with entry.open() as file:
            while data := file.read(wire.CHUNK_BYTES):
                sent += len(data)
                yield pb.ResourceChunk(
                    chunk=pb.ResourceChunk.ResourceContents(
                        chunk=data, checksum=wire.checksum(data), id=identity
                    )
                )
    except FileNotFoundError as error:
        raise InputError(f"{entry.source} has vanished since the build began") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{entry.source} cannot be read: {error}") from error
    if sent != entry.size:
        raise InputError(
            f"{entry.source} has changed while it was sent: expected {entry.size} bytes, found {sent}",
            hint="do not change the build context during a build",
        )
