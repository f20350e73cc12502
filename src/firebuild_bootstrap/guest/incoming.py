"""Files as they come out of the pieces of a stream: entries with their content, every rule of it checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final, NamedTuple

from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader, Limits
from firebuild_bootstrap.wire import MAX_ID

from .errors import ProtocolError

_MAX_HEADER: Final = 1024 * 1024  # a path of 4 KiB, and all regions that a server of ours sends


class Incoming(NamedTuple):
    """One entry on its way into the image.

    Args:
        entry: what it is; its path is below the destination.
        write: writes its content into an open file that is empty, before the next entry is asked for.
        from_directory: it belongs to a directory or archive, which is merged into the destination.
        keep_owner: it has an owner of its own unless the instruction has one.
        of_tree: then it comes from an image or a stage, and is no member of an archive.
    """

    entry: tar.Entry
    write: Callable[[int], None]
    from_directory: bool = False
    keep_owner: bool = False
    of_tree: bool = False


def packed(stream: Iterator[pb.Group | memoryview]) -> Iterator[Incoming]:
    """Cut a packed stream into entries.

    Raises:
        ProtocolError: it is not one, or ends early. So does the writing of an entry's content.
    """
    return _Packed(stream).entries()


def check_owner(name: str, uid: int, gid: int) -> None:
    """Refuse ids that the kernel does not have.

    Raises:
        ProtocolError: it is such a one.
    """
    if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
        raise ProtocolError(f"{name}: the server sent the owner {uid}:{gid}")


class _Packed:
    """The pieces of a tar stream, as a file to read from, and the groups between them."""

    def __init__(self, stream: Iterator[pb.Group | memoryview]) -> None:
        self._stream = stream
        self._group = pb.Group()

    def read(self, _: int, /) -> bytes | memoryview:
        """Return the next piece whole; the reader takes what it gets."""
        for message in self._stream:
            if isinstance(message, pb.Group):
                self._group = message
            elif message:
                return message
        return b""

    def entries(self) -> Iterator[Incoming]:
        first = next(self._stream, None)
        if first is None:
            return  # no entries: no archive
        self._stream = chain((first,), self._stream)
        reader = LayerReader(self, Limits(header=_MAX_HEADER))
        while (entry := _next(reader)) is not None:
            group = self._group
            if group.keep_owner:
                check_owner(entry.path, entry.uid, entry.gid)
            write = _writer(reader, entry)
            yield Incoming(entry, write, group.from_directory, group.keep_owner, group.of_tree)
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
