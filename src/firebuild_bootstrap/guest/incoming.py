"""Files as they come out of a resource stream: entries with their content, every rule of it checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final, NamedTuple

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader, Limits

from .client import Message
from .errors import ProtocolError
from .users import MAX_ID

# Go's os.FileMode, which old servers send, keeps these bits elsewhere than stat(2).
_GO_SETUID, _GO_SETGID, _GO_STICKY = 1 << 23, 1 << 22, 1 << 20
# An old server sends these without end for what it can't read, a link to a directory for example.
_EMPTY_CHUNKS = 16
_MIXED_UP = (
    "; old servers mix up the content of files above 3.6 MB in directories: copy such a file by itself"
)
_KINDS: Final[dict[int, tar.Kind]] = {
    pb.ENTRY_KIND_UNSPECIFIED: tar.FILE,
    pb.ENTRY_KIND_FILE: tar.FILE,
    pb.ENTRY_KIND_DIRECTORY: tar.DIRECTORY,
    pb.ENTRY_KIND_SYMLINK: tar.SYMLINK,
    pb.ENTRY_KIND_HARDLINK: tar.HARDLINK,
}
_MAX_HEADER: Final = 1024 * 1024  # a path of 4 KiB, and all regions that a server of ours sends


class Incoming(NamedTuple):
    """One entry on its way into the image.

    Args:
        entry: what it is; its path is below the destination.
        write: writes its content into an open file that is empty, before the next entry is asked for.
        from_directory: it belongs to a directory or archive, which is merged into the destination.
        keep_owner: it has an owner of its own unless the instruction has one.
        of_tree: then it comes from an image or a stage, and is no member of an archive.
        classic: the header of a server that knows no more than the old fields.
    """

    entry: tar.Entry
    write: Callable[[int], None]
    from_directory: bool = False
    keep_owner: bool = False
    of_tree: bool = False
    classic: pb.ResourceChunk.ResourceHeader | None = None


def incoming(stream: Iterator[Message]) -> Iterator[Incoming]:
    """Cut a resource stream into entries, packed or each by itself.

    Raises:
        ProtocolError: content without a header, a wrong checksum, a chunk or entry longer than announced,
            or an end in the middle of an entry. So does the writing of an entry's content.
    """
    for first in stream:
        rest = chain((first,), stream)
        is_group = not isinstance(first, memoryview) and first.HasField("group")
        yield from _Packed(rest).entries() if is_group else _separate(rest)


# --- packed ---------------------------------------------------------------------------------------


class _Packed:
    """The pieces of a tar stream, as a file to read from, and the groups between them."""

    def __init__(self, stream: Iterator[Message]) -> None:
        self._stream = stream
        self._group = pb.ResourceChunk.Group()

    def read(self, _: int, /) -> bytes:
        """Return the next piece whole; the reader takes what it gets."""
        for message in self._stream:
            if isinstance(message, memoryview):
                if len(message) > wire.MAX_CHUNK_BYTES:
                    limit = wire.MAX_CHUNK_BYTES
                    raise ProtocolError(f"a piece of a resource has {len(message)} bytes, more than {limit}")
                if message:
                    return bytes(message)
            elif message.HasField("group"):
                self._group = message.group
            else:
                kind = message.WhichOneof("payload") or "nothing"
                raise ProtocolError(f"the server sent {kind} in the middle of packed files")
        return b""

    def entries(self) -> Iterator[Incoming]:
        reader = LayerReader(self, Limits(header=_MAX_HEADER))
        while (entry := _next(reader)) is not None:
            group = self._group
            if group.keepOwner:
                _check_owner(entry.path, entry.uid, entry.gid)
            write = _writer(reader, entry)
            yield Incoming(entry, write, group.fromDirectory, group.keepOwner, group.ofTree)
        if not reader.marked or self.read(1):
            raise ProtocolError("the server's stream of files does not end where it says so")


def _next(reader: LayerReader) -> tar.Entry | None:
    try:
        return next(reader, None)
    except DamagedArchive as error:
        raise _damaged(error) from error


def _writer(reader: LayerReader, entry: tar.Entry) -> Callable[[int], None]:
    def write(descriptor: int) -> None:
        try:
            reader.copy_to(descriptor, entry.size)
        except DamagedArchive as error:
            raise _damaged(error) from error

    return write


def _damaged(error: DamagedArchive) -> ProtocolError:
    return ProtocolError(f"the server sent files that can't be read: {error}")


# --- each by itself -------------------------------------------------------------------------------


def _separate(stream: Iterator[Message]) -> Iterator[Incoming]:
    for message in stream:
        kind = _kind_of(message)
        if kind != "header" or isinstance(message, memoryview):
            raise ProtocolError(f"the server sent {kind} where the header of a file was due")
        header = message.header
        _check(header)
        content = _content(stream, header)
        yield Incoming(
            _entry(header),
            _chunk_writer(content),
            header.fromDirectory,
            header.keepOwner,
            header.ofTree,
            header if header.kind == pb.ENTRY_KIND_UNSPECIFIED else None,
        )
        for _ in content:  # what the receiver had no use for is still checked
            pass


def _kind_of(message: Message) -> str:
    return "piece" if isinstance(message, memoryview) else message.WhichOneof("payload") or "nothing"


def _entry(header: pb.ResourceChunk.ResourceHeader) -> tar.Entry:
    kind = _KINDS.get(header.kind)
    name = header.entryPath or header.sourcePath
    if kind is None:
        raise ProtocolError(f"{name}: the server sent an entry of kind {header.kind}")
    mode = header.fileMode
    special = 0o4000 if mode & _GO_SETUID else 0
    special |= 0o2000 if mode & _GO_SETGID else 0
    special |= 0o1000 if mode & _GO_STICKY else 0
    path = header.entryPath if header.fromDirectory else name
    return tar.Entry(
        path,
        kind,
        (mode & 0o7777) | special,
        header.uid,
        header.gid,
        header.mtimeNs,
        header.size,
        header.linkTarget,
    )


def _chunk_writer(content: Iterator[bytes]) -> Callable[[int], None]:
    def write(descriptor: int) -> None:
        with open(descriptor, "wb", buffering=0, closefd=False) as file:
            for data in content:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]

    return write


def _content(stream: Iterator[Message], header: pb.ResourceChunk.ResourceHeader) -> Iterator[bytes]:
    name = header.entryPath or header.sourcePath
    received = empty = 0
    announced, is_file = _announced(header), header.kind == pb.ENTRY_KIND_FILE
    for message in stream:
        kind = _kind_of(message)
        if kind == "eof" and not isinstance(message, memoryview):
            _check_id(header, message.eof.id)
            if announced is not None and received != announced:
                raise ProtocolError(f"{name}: {announced} bytes were announced, {received} came")
            return
        if kind != "chunk" or isinstance(message, memoryview):
            raise ProtocolError(f"{name}: the server sent {kind} before the end of the file")
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
    if header.keepOwner:
        _check_owner(name, header.uid, header.gid)


def _check_owner(name: str, uid: int, gid: int) -> None:
    if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
        raise ProtocolError(f"{name}: the server sent the owner {uid}:{gid}")


def _check_id(header: pb.ResourceChunk.ResourceHeader, identifier: str) -> None:
    # Old servers' ids are not relied on, as old guests ignore them too.
    if header.kind != pb.ENTRY_KIND_UNSPECIFIED and identifier != header.id:
        raise ProtocolError(f"{header.entryPath or header.sourcePath}: the server mixed two files")
