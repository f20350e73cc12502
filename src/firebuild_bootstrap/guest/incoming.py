"""Files as they come out of a resource stream: headers with their content, every rule of it checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb

from .errors import ProtocolError
from .users import MAX_ID

# Go's os.FileMode, which old servers send, keeps these bits elsewhere than stat(2).
_GO_SETUID, _GO_SETGID, _GO_STICKY = 1 << 23, 1 << 22, 1 << 20
# An old server sends these without end for what it can't read, a link to a directory for example.
_EMPTY_CHUNKS = 16
_MIXED_UP = (
    "; old servers mix up the content of files above 3.6 MB in directories: copy such a file by itself"
)


@dataclass(frozen=True)
class Incoming:
    """One entry; `content` yields its checked chunks and has to be exhausted before the next entry."""

    header: pb.ResourceChunk.ResourceHeader
    content: Iterator[bytes] = field(repr=False)

    @property
    def extended(self) -> bool:
        """Whether the server knows the extended header; an old one leaves its fields empty."""
        return self.header.kind != pb.ENTRY_KIND_UNSPECIFIED

    @property
    def mode(self) -> int:
        """Permission bits with setuid, setgid and sticky, from stat(2)'s or Go's representation."""
        mode = self.header.fileMode
        special = 0o4000 if mode & _GO_SETUID else 0
        special |= 0o2000 if mode & _GO_SETGID else 0
        special |= 0o1000 if mode & _GO_STICKY else 0
        return (mode & 0o7777) | special


def incoming(stream: Iterator[pb.ResourceChunk]) -> Iterator[Incoming]:
    """Cut a resource stream into entries.

    Raises:
        ProtocolError: content without a header, a wrong checksum, a chunk or entry longer than announced,
            or an end in the middle of an entry. So does the iteration of an entry's content.
    """
    for message in stream:
        kind = message.WhichOneof("payload")
        if kind != "header":
            raise ProtocolError(f"the server sent {kind or 'nothing'} where the header of a file was due")
        _check(message.header)
        content = _content(stream, message.header)
        yield Incoming(message.header, content)
        for _ in content:  # what the receiver had no use for is still checked
            pass


def _content(stream: Iterator[pb.ResourceChunk], header: pb.ResourceChunk.ResourceHeader) -> Iterator[bytes]:
    name = header.entryPath or header.sourcePath
    received = empty = 0
    announced, is_file = _announced(header), header.kind == pb.ENTRY_KIND_FILE
    for message in stream:
        kind = message.WhichOneof("payload")
        if kind == "eof":
            _check_id(header, message.eof.id)
            if announced is not None and received != announced:
                raise ProtocolError(f"{name}: {announced} bytes were announced, {received} came")
            return
        if kind != "chunk":
            raise ProtocolError(f"{name}: the server sent {kind or 'nothing'} before the end of the file")
        _check_id(header, message.chunk.id)
        data = message.chunk.chunk
        if len(data) > wire.MAX_CHUNK_BYTES:
            raise ProtocolError(f"{name}: a chunk has {len(data)} bytes, more than {wire.MAX_CHUNK_BYTES}")
        if wire.checksum(data) != message.chunk.checksum:
            hint = "" if header.kind else _MIXED_UP
            raise ProtocolError(f"{name}: the checksum of a chunk is wrong after {received} bytes{hint}")
        received += len(data)
        # Before it is written: what is not announced must not fill the drive. Of directories and links
        # nothing is written, and the end of the entry tells more.
        if announced is not None and received > max(announced, 0 if is_file else wire.MAX_CHUNK_BYTES):
            raise ProtocolError(f"{name}: {announced} bytes were announced, and more than {announced} came")
        empty = 0 if data else empty + 1
        if empty > _EMPTY_CHUNKS:
            raise ProtocolError(f"{name}: the server sends nothing but empty chunks, it can't read the file")
        yield data
    raise ProtocolError(f"{name}: the server's stream ended in the middle of the file")


def _announced(header: pb.ResourceChunk.ResourceHeader) -> int | None:
    """Return how many bytes of content an entry has; None from an old server, which does not say."""
    if header.kind == pb.ENTRY_KIND_UNSPECIFIED:
        return None
    return header.size if header.kind == pb.ENTRY_KIND_FILE else 0


def _check(header: pb.ResourceChunk.ResourceHeader) -> None:
    """Refuse what no file system has, in the server's words rather than in those of a system call."""
    name = header.entryPath or header.sourcePath
    texts = (header.sourcePath, header.targetPath, header.targetWorkdir, header.entryPath, header.linkTarget)
    if any("\0" in text for text in texts):
        raise ProtocolError(f"{name!r:.200}: the server sent a path with a NUL")
    if header.size < 0:
        raise ProtocolError(f"{name}: the server announced {header.size} bytes")
    if header.keepOwner and not (0 <= header.uid <= MAX_ID and 0 <= header.gid <= MAX_ID):
        raise ProtocolError(f"{name}: the server sent the owner {header.uid}:{header.gid}")


def _check_id(header: pb.ResourceChunk.ResourceHeader, identifier: str) -> None:
    # Old servers' ids are not relied on, as old guests ignore them too.
    if header.kind != pb.ENTRY_KIND_UNSPECIFIED and identifier != header.id:
        raise ProtocolError(f"{header.entryPath or header.sourcePath}: the server mixed two files")
