"""Entries -> ext4 file system image, written in one pass without mounting it; `ext4layout` has a picture.

Contents go to their place at once. Inodes and entries of directories wait in two files without a name: how
many there are decides where they go, and the UUID, on which all checksums depend, is a digest of them. So
memory holds the directories on the way down, and 24 bytes for each other one.

The same entries give the same bytes everywhere: nothing comes from the clock, from chance or from the host.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG
from struct import Struct, pack, pack_into
from typing import Final, NamedTuple

from firebuild_bootstrap.image.worker import ext4nodes as nodes
from firebuild_bootstrap.image.worker.ext4hash import CRC_START, crc32c, crc32c_each
from firebuild_bootstrap.image.worker.ext4layout import (
    FIRST_INODE,
    GROUP,
    JOURNAL,
    RESIZE,
    ROOT,
    Identity,
    Plan,
    Space,
    TooManyGroupsError,
    content_uuid,
    group_blocks,
    journal_superblock,
    place,
    reserved_blocks,
)
from firebuild_bootstrap.image.worker.ext4nodes import BLOCK_SIZE, INODE_SIZE
from firebuild_bootstrap.layers.tar import (
    BLOCK_DEVICE,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    PIECE,
    SYMLINK,
    Content,
    Entry,
    LayerError,
    changed,
)
from firebuild_bootstrap.layers.tree import copy_region

_MIB: Final = 1 << 20
_BLOCKS_PER_MIB: Final = _MIB // BLOCK_SIZE
_LOST_AND_FOUND: Final = "lost+found"
_NO_NAMES: Final = (b"", b".", b"..")
_MOST_BYTES: Final = BLOCK_SIZE << 32  # the resize inode has no room for larger numbers of blocks
_MAX_SIZE: Final = (1 << 32) - 1  # blocks of a file
_BYTES_PER_INODE: Final = 16384  # of a file system of a given size, as mke2fs has it
_COPIED: Final = 256 * 1024  # contents that do not pass through the memory of this process
_INODES_AT_ONCE: Final = 8192
_TYPES: Final = {
    FILE: (S_IFREG, 1),
    DIRECTORY: (S_IFDIR, nodes.DIRECTORY_TYPE),
    CHARACTER: (S_IFCHR, 3),
    BLOCK_DEVICE: (S_IFBLK, 4),
    FIFO: (S_IFIFO, 5),
    SYMLINK: (S_IFLNK, 7),
}
_ZEROS: Final = bytes(BLOCK_SIZE)
_NUMBER: Final = Struct("<I")


class Ext4Options(NamedTuple):
    """How the file system is made.

    Args:
        free: bytes of free space that the guest finds, at least, when no size is asked for.
        size: bytes of the whole image; 0 means as `free` wants it.
        label: name of the file system, up to 16 bytes.
        inodes: number of files that can be made on it besides, at least.
        journal: whether it has one, for machines that die while it is mounted for writing.
        internal: it is a drive of a machine, and nobody's image: without lost+found, which is in no layer.
    """

    free: int = 64 * _MIB
    size: int = 0
    label: str = "rootfs"
    inodes: int = 4096
    journal: bool = True
    internal: bool = False


def make_ext4(files: Iterable[tuple[Entry, Content]], image: str, options: Ext4Options) -> None:
    """Write `files` into the new file `image`.

    Args:
        files: what is in it, in the order of `tree_entries`: the root, then each directory with all below.
        image: path of the file. Where something fails there is none afterwards.
        options: how it is made.

    Raises:
        LayerError: they do not fit into the size, or are nothing that ext4 can hold.
        OSError: the disk is full.
    """
    writer = Ext4Writer(image, options)  # fails where there is such a file, which stays
    try:
        with writer:
            for entry, content in files:
                writer.add(entry, content)
            writer.finish()
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(image)
        raise


def make_empty_ext4(image: str, size: int, *, journal: bool) -> None:
    """Make the new sparse file `image` of `size` bytes, with an empty file system that one machine uses.

    Args:
        image: path of the file.
        size: a multiple of 1 MiB.
        journal: it has to outlive a machine that dies.

    Raises:
        LayerError: it is too small.
        OSError: the disk is full.
    """
    options = Ext4Options(size=size, label="", inodes=0, journal=journal, internal=not journal)
    make_ext4([(Entry("", DIRECTORY, 0o755), b"")], image, options)


class _Folder:
    """A directory that is being filled."""

    def __init__(
        self, path: str, number: int, parent: int, entry: Entry, attributes: tuple[int, bytes]
    ) -> None:
        self.path = path
        self.number = number
        self.parent = parent
        self.entry = entry
        self.attributes = attributes
        self.entries = bytearray()
        self.last = b""
        self.folders = 0


class Ext4Writer:
    """Writes one image. A context manager, which closes its files.

    Args:
        image: path of the new file.
        options: how it is made.
    """

    def __init__(self, image: str, options: Ext4Options) -> None:
        self._asked = options.size
        self._options = options = options._replace(size=-(-options.size // _MIB) * _MIB)
        if options.size > _MOST_BYTES:
            raise LayerError("an ext4 file system has 16 TiB at most", "ask for less", asked=True)
        self._space = Space(options.size)
        with ExitStack() as stack:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(image, flags, 0o666)
            stack.callback(os.close, self._file)
            where = os.path.dirname(image) or "."
            self._inodes = stack.enter_context(tempfile.TemporaryFile(dir=where))
            self._folders = stack.enter_context(tempfile.TemporaryFile(dir=where))
            self._stack = stack.pop_all()
        self._waiting = bytearray()  # content that is still to be written, and where
        self._waiting_at = 0
        self._new_inodes = bytearray(nodes.inode(0, (0, 0), 0, links=0) * (FIRST_INODE - 1))
        self._next = FIRST_INODE
        self._open: list[_Folder] = []
        self._prefix = ""  # of the paths in the innermost directory
        # Of each finished directory: its inode, that of the one above, the length of its entries.
        self._closed = array("Q")
        # Blocks that lack their checksum: of maps, with the inode, and of attributes, with 0.
        self._unchecked = array("Q")
        # Inode and type of what may get another name; directories do not.
        self._numbers: dict[str, tuple[int, int]] = {}
        self._links: dict[int, int] = {}
        self._has_lost_and_found = options.internal

    def __enter__(self) -> Ext4Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, entry: Entry, content: Content = b"") -> None:
        """Write one entry.

        Args:
            entry: the root first.
            content: of a regular file. A descriptor where there may be another name of what is no file.

        Raises:
            LayerError: ext4 can't hold it, it is not where the order of `tree_entries` has it, or the content
                is shorter than announced.
            OSError: the disk is full, or the content can't be read.
        """
        path, kind = entry.path, entry.kind
        parent, _, base = path.rpartition("/")
        if not path or parent != self._prefix:
            self._go_to(entry, parent)
        elif not self._open:
            raise LayerError(f"/{path} comes before the root")
        if path == _LOST_AND_FOUND:
            self._has_lost_and_found = True
        name = self._name(path, base) if path else b""
        if kind == HARDLINK:
            number, file_type = self._link(entry)
        else:
            try:
                mode, file_type = _TYPES[kind]
            except KeyError:
                raise LayerError(f"/{path}: a {kind} can't be in a file system") from None
            attributes = self._attributes(entry) if entry.xattrs else (0, b"")
            if kind == DIRECTORY:
                self._enter(entry, name, attributes)
                return
            number = self._next
            if kind == FILE:
                self._add_file(entry, content, mode | entry.mode, attributes)
            else:
                if isinstance(content, int):
                    self._numbers[path] = number, file_type
                self._add_other(entry, mode | entry.mode, attributes)
        self._open[-1].entries += nodes.dirent(number, name, file_type)

    def _name(self, path: str, base: str) -> bytes:
        name = os.fsencode(base)
        if len(name) > nodes.MAX_NAME:
            raise LayerError(f"/{path}: its name has more than {nodes.MAX_NAME} bytes, which ext4 can't hold")
        if name in _NO_NAMES or b"\0" in name:
            raise LayerError(f"{path!r} can't be the name of a file")
        folder = self._open[-1]
        if name <= folder.last:  # so none is there twice
            raise LayerError(f"/{path} is not in the order of the names in its directory")
        folder.last = name
        return name

    def _go_to(self, entry: Entry, parent: str) -> None:
        """Leave directories until the one is reached that an entry is in."""
        if not entry.path:
            if self._open or entry.kind != DIRECTORY:
                raise LayerError("the root is not the first entry, or not a directory")
            return
        while self._open and self._open[-1].path != parent:
            self._leave()
        if not self._open:
            raise LayerError(f"/{entry.path} is not beside the other entries of its directory")
        self._prefix = parent

    def _enter(self, entry: Entry, name: bytes, attributes: tuple[int, bytes]) -> None:
        number = parent = ROOT
        if entry.path:
            number, parent = self._next, self._open[-1].number
            self._put_inode(bytes(INODE_SIZE))  # it is known when all in there is
            self._open[-1].folders += 1
            self._open[-1].entries += nodes.dirent(number, name, nodes.DIRECTORY_TYPE)
        self._open.append(_Folder(entry.path, number, parent, entry, attributes))
        self._prefix = entry.path

    def _leave(self) -> None:
        folder = self._open.pop()
        links = 2 + folder.folders
        head = nodes.inode(
            S_IFDIR | folder.entry.mode,
            (folder.entry.uid, folder.entry.gid),
            folder.entry.mtime_ns,
            links=links if links < nodes.MAX_LINKS else 1,  # dir_nlink
            attribute_block=folder.attributes[0],
            attributes=folder.attributes[1],
        )
        self._folders.write(head)
        self._folders.write(folder.entries)
        self._closed.extend((folder.number, folder.parent, len(folder.entries)))

    def _link(self, entry: Entry) -> tuple[int, int]:
        number, file_type = self._numbers.get(entry.linkname, (0, 0))
        if not number:
            raise LayerError(
                f"/{entry.path} is another name of /{entry.linkname}, which was not there before"
            )
        links = self._links.get(number, 1) + 1
        if links > nodes.MAX_LINKS:
            raise LayerError(
                f"/{entry.linkname} has more than {nodes.MAX_LINKS} names, which ext4 can't hold",
                "choose another form",
            )
        self._links[number] = links
        return number, file_type

    def _put_inode(self, data: bytes) -> None:
        self._next += 1
        self._new_inodes += data
        if len(self._new_inodes) >= PIECE:
            self._inodes.write(self._new_inodes)
            self._new_inodes = bytearray()

    def _put_node(
        self,
        entry: Entry,
        mode: int,
        attributes: tuple[int, bytes],
        *,
        size: int,
        blocks: int,
        flags: int,
        content: bytes,
    ) -> None:
        attribute_block, inner = attributes
        self._put_inode(
            nodes.inode(
                mode,
                (entry.uid, entry.gid),
                entry.mtime_ns,
                size=size,
                blocks=blocks + (1 if attribute_block else 0),
                flags=flags,
                content=content,
                attribute_block=attribute_block,
                attributes=inner,
            )
        )

    # Contents. --------------------------------------------------------------------------------------------

    def _add_file(self, entry: Entry, content: Content, mode: int, attributes: tuple[int, bytes]) -> None:
        size = entry.size
        if not isinstance(content, int) or os.fstat(content).st_nlink > 1:
            self._numbers[entry.path] = self._next, _TYPES[FILE][1]
        count = -(-size // BLOCK_SIZE)
        further = 0
        if not size:
            extents = nodes.NO_EXTENTS
        elif (
            entry.regions is None
            and size <= _COPIED
            and isinstance(content, int | bytes | bytearray | memoryview)
        ):
            # Nearly all files.
            data = os.pread(content, size, 0) if isinstance(content, int) else content
            if len(data) != size:
                raise changed(entry.path)
            extents, further = self._put(data, self._next)
        else:
            extents, further, count = self._put_regions(entry, content)
        self._put_node(
            entry,
            mode,
            attributes,
            size=size,
            blocks=count + further,
            flags=nodes.EXTENTS_FLAG,
            content=extents,
        )

    def _add_other(self, entry: Entry, mode: int, attributes: tuple[int, bytes]) -> None:
        data, size, flags, blocks = b"", 0, 0, 0
        if entry.kind == SYMLINK:
            text = os.fsencode(entry.linkname)
            size = len(text)
            if not 0 < size < BLOCK_SIZE:
                raise LayerError(f"/{entry.path}: a symbolic link of {size} bytes can't be in ext4")
            if size < 60:
                data = text
            else:
                data, _ = self._put(text, self._next)
                flags = nodes.EXTENTS_FLAG
                blocks += 1
        elif entry.kind != FIFO:
            data = nodes.device(entry.path, *entry.device)
        self._put_node(entry, mode, attributes, size=size, blocks=blocks, flags=flags, content=data)

    def _attributes(self, entry: Entry) -> tuple[int, bytes]:
        """Return the block of further attributes, if any, and what goes into the inode."""
        inside, outside = nodes.attributes(entry.path, entry.xattrs)
        return self._put_metadata(outside, 0) if outside else 0, inside

    def _put(self, data: bytes | bytearray | memoryview, number: int) -> tuple[bytes, int]:
        """Write a content that is in memory; return the map for inode `number`, and the blocks of the map."""
        runs = list(_runs(self._space.take(-(-len(data) // BLOCK_SIZE))))
        if len(runs) == 1 and runs[0][2] <= GROUP:
            self._write(runs[0][1], data)
            return nodes.one_extent(*runs[0][1:]), 0
        for at, start, count in runs:
            self._write(start, data[at * BLOCK_SIZE : (at + count) * BLOCK_SIZE])
        return self._map(runs, number)

    def _map(self, runs: Sequence[nodes.Run], number: int) -> tuple[bytes, int]:
        return nodes.extent_map(runs, lambda block: self._put_metadata(block, number))

    def _put_regions(self, entry: Entry, content: Content) -> tuple[bytes, int, int]:
        """Write a content and return its map, how many blocks the map takes, and how many the content."""
        if entry.size > _MAX_SIZE * BLOCK_SIZE:
            raise LayerError(f"/{entry.path} has {entry.size} bytes, and ext4 no files of more than 16 TiB")
        regions = entry.regions if entry.regions is not None else ((0, entry.size),)
        runs: list[nodes.Run] = []
        behind = 0  # the first block of the file that has no place yet
        source = _Source(entry.path, content)
        for offset, length in regions:
            first, last = offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)
            for start, count in self._space.take(max(0, last - max(first, behind))):
                at = max(first, behind)
                if runs and runs[-1][0] + runs[-1][2] == at and runs[-1][1] + runs[-1][2] == start:
                    runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + count)
                else:
                    runs.append((at, start, count))
                behind = at + count
            self._put_region(source, runs, offset, length)
        return *self._map(runs, self._next), sum(count for _, _, count in runs)

    def _put_region(self, source: _Source, runs: list[nodes.Run], offset: int, length: int) -> None:
        self._flush()
        place = len(runs) - 1
        while place > 0 and runs[place][0] * BLOCK_SIZE > offset:
            place -= 1
        while length:
            logical, start, count = runs[place]
            inside = offset - logical * BLOCK_SIZE
            some = min(length, count * BLOCK_SIZE - inside)
            source.copy(self._file, offset, some, start * BLOCK_SIZE + inside)
            offset += some
            length -= some
            place += 1

    def _put_metadata(self, block: bytes, inode: int) -> int:
        ((number, _),) = self._space.take(1)
        self._write(number, block)
        self._unchecked.extend((number, inode))
        return number

    def _write(self, block: int, data: bytes | bytearray | memoryview) -> None:
        """Write a block or more; the rest of the last one is zeros, as a new file is."""
        waiting = self._waiting
        place = block * BLOCK_SIZE
        if len(waiting) >= PIECE or place != self._waiting_at + len(waiting):
            self._flush()
            self._waiting_at = place
        self._waiting += data
        if rest := len(data) % BLOCK_SIZE:
            self._waiting += _ZEROS[rest:]

    def _flush(self) -> None:
        if self._waiting:
            _write_at(self._file, self._waiting, self._waiting_at)
            self._waiting_at += len(self._waiting)
            self._waiting = bytearray()

    # The end. ---------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write everything but the contents.

        Raises:
            LayerError: the files do not fit into the size.
            OSError: the disk is full.
        """
        if not self._open:
            raise LayerError("there is not even a root directory")
        root = self._open[0].entry
        if not self._has_lost_and_found:
            while len(self._open) > 1:
                self._leave()
            self._enter(
                Entry(_LOST_AND_FOUND, DIRECTORY, 0o700, 0, 0, root.mtime_ns),
                _LOST_AND_FOUND.encode(),
                (0, b""),
            )
        while self._open:
            self._leave()
        self._inodes.write(self._new_inodes)
        identity = self._identity()
        self._write_directories(identity)
        self._add_checksums(identity.checksum)
        plan = self._plan()
        os.ftruncate(self._file, self._options.size or plan.blocks * BLOCK_SIZE)
        journal = self._write_own_files(plan, identity.uuid)
        self._write_inodes(plan, identity.checksum)
        for block, data in group_blocks(plan, identity, self._next - 1, self._closed[::3], journal):
            self._write(block, data)
        self._flush()

    def _identity(self) -> Identity:
        """Derive it from all but the contents of files, which are not read for it."""
        label = self._options.label.encode()
        found = hashlib.sha256(label + b"\n")
        piece = memoryview(bytearray(PIECE))
        for file in (self._inodes, self._folders):
            file.seek(0)
            while count := file.readinto(piece):
                found.update(piece[:count])
        uuid = content_uuid(found.digest())
        return Identity(uuid, found.digest()[16:], label, crc32c(CRC_START, uuid))

    def _write_directories(self, identity: Identity) -> None:
        self._folders.seek(0)
        closed = iter(self._closed)
        for number, parent, length in zip(closed, closed, closed, strict=True):
            inode = bytearray(self._folders.read(INODE_SIZE))
            entries = self._folders.read(length)
            seed = _inode_seed(identity.checksum, number)
            data, flags = nodes.directory(number, parent, entries, seed, identity.hash_seed)
            extents, further = self._put(data, number)
            blocks = len(data) // BLOCK_SIZE + further + (inode[0x68:0x6C] != b"\0\0\0\0")
            pack_into("<I", inode, 0x4, len(data) & 0xFFFFFFFF)
            pack_into("<I", inode, 0x6C, len(data) >> 32)
            pack_into("<II", inode, 0x1C, blocks * 8, flags | nodes.EXTENTS_FLAG)
            inode[0x28:0x64] = extents.ljust(60, b"\0")
            self._patch(number, 0, inode)

    def _patch(self, number: int, place: int, data: bytes | bytearray) -> None:
        self._inodes.flush()
        _write_at(self._inodes.fileno(), data, (number - 1) * INODE_SIZE + place)

    def _add_checksums(self, seed: int) -> None:
        for number, links in self._links.items():
            self._patch(number, nodes.LINKS_PLACE, pack("<H", links))
        self._flush()
        for block, inode in zip(self._unchecked[::2], self._unchecked[1::2], strict=True):
            place = block * BLOCK_SIZE
            data = os.pread(self._file, BLOCK_SIZE, place)
            if inode:
                checksum = nodes.extent_block_checksum(_inode_seed(seed, inode), data)
                _write_at(self._file, checksum, place + BLOCK_SIZE - 4)
            else:
                checksum = nodes.attribute_block_checksum(seed, block, data)
                _write_at(self._file, checksum, place + 16)

    def _plan(self) -> Plan:
        """Find a place for what remains.

        Raises:
            LayerError: it does not fit.
        """
        options = self._options
        inodes = self._next - 1 + (self._next - 1) // 4 + options.inodes
        if options.size:
            inodes = max(inodes, options.size // _BYTES_PER_INODE)
            if plan := self._placed(options.size // BLOCK_SIZE, inodes):
                return plan
        free = 0 if options.size else -(-options.free // BLOCK_SIZE)
        blocks = _whole_mib(self._space.at + free)
        while (plan := self._placed(blocks, inodes)) is None or plan.free < free:
            # What is missing, at least; more blocks can need more of their own.
            blocks = _whole_mib(blocks + (1 if plan is None else free - plan.free))
        if options.size:
            least = blocks // _BLOCKS_PER_MIB
            asked = self._asked if self._asked % 1024 else f"{self._asked // 1024}KiB"
            raise LayerError(
                f"--output ext4: the files need size={least}MiB, found size={asked}",
                f"ask for size={least}MiB or more, or leave size= out",
                asked=True,
            )
        return plan

    def _placed(self, blocks: int, inodes: int) -> Plan | None:
        try:
            return place(self._space, blocks, inodes, journal=self._options.journal)
        except TooManyGroupsError:
            raise LayerError(
                "an ext4 file system of more than 1 TiB is written only where its size is known beforehand",
                "say how large it has to be: --output ext4,size=…",
                asked=True,
            ) from None

    def _write_own_files(self, plan: Plan, uuid: bytes) -> bytes:
        """Write the journal, whose inode is returned, and the resize inode."""
        inode = b""
        if plan.journal:
            size = sum(count for _, count in plan.journal)
            self._write(plan.journal[0][0], journal_superblock(size, uuid))
            content, _ = nodes.extent_map(list(_runs(plan.journal)), len)  # so few fit into the inode
            inode = _own_inode(size * BLOCK_SIZE, size, nodes.EXTENTS_FLAG, content)
            self._patch(JOURNAL, 0, inode)
        for block, data in reserved_blocks(plan):
            self._write(block, data)
        blocks = 1 + len(plan.reserved) * len(plan.space.backups(plan.groups))
        content = bytes(13 * 4) + pack("<I", plan.reserved_map)  # the place of a map of two levels
        self._patch(RESIZE, 0, _own_inode((1024 * 1024 + 1024 + 12) * BLOCK_SIZE, blocks, 0, content))
        return inode

    def _write_inodes(self, plan: Plan, checksum: int) -> None:
        self._inodes.seek(0)
        number = 1
        for table in plan.tables:
            at = table * BLOCK_SIZE
            rest = plan.inodes
            while rest and (data := bytearray(self._inodes.read(min(rest, _INODES_AT_ONCE) * INODE_SIZE))):
                count = len(data) // INODE_SIZE
                numbers = b"".join(map(_NUMBER.pack, range(number, number + count)))
                fields = ((numbers, 4), (bytes(4 * count), 4), (data, INODE_SIZE))
                checksums = crc32c_each(checksum, fields, count)
                for where, each in zip(nodes.CHECKSUM_PLACES, checksums, strict=True):
                    data[where::INODE_SIZE] = each
                _write_at(self._file, data, at)
                at += len(data)
                number += count
                rest -= count


class _Source:
    """The content of a file, whatever it comes from."""

    def __init__(self, path: str, content: Content) -> None:
        self._path = path
        self._stream = BytesIO(content) if isinstance(content, bytes | bytearray | memoryview) else content

    def copy(self, file: int, offset: int, length: int, place: int) -> None:
        """Write the next `length` bytes, which are at `offset` in the file, to `place`."""
        if isinstance(self._stream, int):
            if copy_region(self._stream, file, offset, length, place):
                raise changed(self._path)
            return
        while length:
            data = self._stream.read(min(length, PIECE))
            if not data:
                raise changed(self._path)
            _write_at(file, data, place)
            place += len(data)
            length -= len(data)


def _inode_seed(checksum: int, number: int) -> int:
    return crc32c(checksum, pack("<II", number, 0))


def _own_inode(size: int, blocks: int, flags: int, content: bytes) -> bytes:
    return nodes.inode(S_IFREG | 0o600, (0, 0), 0, size=size, blocks=blocks, flags=flags, content=content)


def _runs(stretches: Iterable[tuple[int, int]]) -> Iterator[nodes.Run]:
    """Yield stretches of blocks on the disk as blocks of a file."""
    at = 0
    for start, count in stretches:
        yield at, start, count
        at += count


def _whole_mib(blocks: int) -> int:
    return -(-blocks // _BLOCKS_PER_MIB) * _BLOCKS_PER_MIB


def _write_at(file: int, data: bytes | bytearray | memoryview, place: int) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, place)
        rest = rest[done:]
        place += done
