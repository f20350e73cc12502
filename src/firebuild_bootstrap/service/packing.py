"""The files of one COPY, ADD or mount as one tar stream in pieces (docs/wire-protocol.md).

Three messages for each file, as other guests get them, cost more than the content of most files does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.context.entries import (
    NO_ATTRIBUTES,
    Entry,
    FileOnDisk,
    attributes_of,
    content,
    ended_early,
    has_grown,
    reading,
)
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.tree import data_regions
from firebuild_bootstrap.messages import encode_piece

# Files up to here travel together with others; larger ones are read right into messages of their own.
_SMALL_BYTES: Final = 128 * 1024
# What has more holes is sent with them: a header has its limit.
_MAX_REGIONS: Final = 10_000


def packed(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the messages, encoded; about one of them is in memory.

    A group says what the tar format has no place for, for the entries that begin after it.

    Raises:
        InputError: a file has vanished, cannot be read or has changed.
    """
    group: tuple[bool, bool, bool, bool] | None = None
    waiting = bytearray()
    for entry in entries:
        keeps = entry.owner is not None
        own = (entry.from_directory, keeps, keeps and not entry.member, entry.passed)
        if own != group:
            if waiting:
                yield encode_piece(waiting)
                waiting = bytearray()
            group = own
            yield _group(*own)
        for part in _parts(entry):
            # Parts join what waits for them; whole megabytes do not, which would be copied once more for it.
            if len(waiting) + len(part) > wire.CHUNK_BYTES:
                yield encode_piece(waiting)
                waiting = bytearray()
            if len(part) == wire.CHUNK_BYTES:
                yield encode_piece(part)
            else:
                waiting += part
    if group is not None:
        yield encode_piece(waiting)
        yield encode_piece(bytes(2 * tar.BLOCK))


def _group(from_directory: bool, keep_owner: bool, of_tree: bool, passed: bool) -> bytes:
    group = pb.Group(from_directory=from_directory, keep_owner=keep_owner, of_tree=of_tree, passed=passed)
    return pb.ToGuest(group=group).SerializeToString()


def _parts(entry: Entry) -> Iterable[bytes | memoryview]:
    """Return an entry of the archive in parts of at most a megabyte, each to be taken before the next."""
    if entry.kind != tar.FILE:
        return (tar.encode(_header(entry), 0)[0],)
    if entry.file is None:
        return _stream(entry)
    if entry.size <= _SMALL_BYTES:
        return (_small(entry, entry.file),)
    return _large(entry, entry.file)


def _header(
    entry: Entry, regions: tar.Regions | None = None, attributes: Mapping[str, bytes] = NO_ATTRIBUTES
) -> tar.Entry:
    uid, gid = entry.owner or (0, 0)
    if entry.attributes is not None:
        attributes = entry.attributes
    return tar.Entry(
        entry.path,
        entry.kind,
        entry.mode,
        uid,
        gid,
        entry.mtime_ns,
        entry.size,
        entry.link_target,
        entry.device,
        attributes,
        regions,
    )


def _small(entry: Entry, file: FileOnDisk) -> bytes:
    """Return a whole file that fits into a message with others."""
    size = entry.size
    descriptor = file.descriptor()
    try:
        data = os.read(descriptor, size + 1)
        attributes = attributes_of(descriptor)
        while len(data) < size and (more := os.read(descriptor, size + 1 - len(data))):
            data += more
    except OSError as error:
        raise file.unreadable(error) from error
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise file.changed(ended_early(size - len(data), size) if len(data) < size else has_grown(size))
    header = tar.encode(_header(entry, attributes=attributes), size)[0]
    return b"".join((header, data, bytes(-size % tar.BLOCK)))


def _stream(entry: Entry) -> Iterator[bytes]:
    regions = entry.regions
    if regions is not None and len(regions) > _MAX_REGIONS:
        regions = None
    header = _header(entry, regions)
    head, table = tar.encode(header, header.stored)
    yield head
    if regions is None:
        yield from content(entry)
    elif entry.stored is None:
        yield from _within(regions, content(entry))
    else:
        with reading(entry):
            yield from entry.stored()
    yield bytes(-(header.stored + table) % tar.BLOCK)


def _within(regions: tar.Regions, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield what of the pieces of a file is in its regions: zeros are all the rest."""
    waiting = iter(regions)
    begin, length = next(waiting, (sys.maxsize, 0))
    at = 0
    for piece in pieces:
        while begin < at + len(piece):
            data = piece[max(begin - at, 0) : begin + length - at]
            if data:
                yield data
            if begin + length > at + len(piece):
                break
            begin, length = next(waiting, (sys.maxsize, 0))
        at += len(piece)


def _large(entry: Entry, file: FileOnDisk) -> Iterator[bytes | memoryview]:
    descriptor = file.descriptor()
    try:
        yield from _regions(entry, file, descriptor)
    except OSError as error:
        raise file.unreadable(error) from error
    finally:
        os.close(descriptor)


def _regions(entry: Entry, file: FileOnDisk, descriptor: int) -> Iterator[bytes | memoryview]:
    """Yield a file without its holes; what was yielded is gone with the next."""
    regions = data_regions(descriptor, entry.size)
    if regions is not None and len(regions) > _MAX_REGIONS:
        regions = None
    header = _header(entry, regions, attributes_of(descriptor))
    head, table = tar.encode(header, header.stored)
    yield head
    # One piece of memory for all, which stays in the core's cache; each piece is copied into its message.
    buffer = memoryview(bytearray(min(entry.size, wire.CHUNK_BYTES)))
    for begin, length in ((0, entry.size),) if regions is None else regions:
        at, end = begin, begin + length
        while at < end:
            size = os.preadv(descriptor, [buffer[: end - at]], at)
            if not size:
                raise file.changed(ended_early(entry.size - at, entry.size))
            at += size
            yield buffer[:size]
    missing = entry.size - os.fstat(descriptor).st_size  # the end of it may be a hole
    if missing > 0:
        raise file.changed(ended_early(missing, entry.size))
    if os.pread(descriptor, 1, entry.size):
        raise file.changed(has_grown(entry.size))
    yield bytes(-(header.stored + table) % tar.BLOCK)
