"""COPY and ADD: the entries of a stream, where each goes, and what it gets (Dockerfile reference, COPY)."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Final, NamedTuple

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.apply import DEEPEST, ENTRY_BYTES, REMEMBERED
from firebuild_bootstrap.layers.reader import DamagedArchive, LayerReader, Limits
from firebuild_bootstrap.layers.root import Metadata, Owner, Root, make_link, set_metadata, settle
from firebuild_bootstrap.wire import MAX_ID
from firebuild_pki.values import dataclass

from .errors import ProtocolError, StepError
from .users import Users, check_mapped, parse_mode

_MAX_HEADER: Final = 1024 * 1024  # a path of 4 KiB, and all regions that a server of ours sends


class Incoming(NamedTuple):
    """One entry on its way into the image.

    Args:
        entry: what it is; its path is below the destination.
        write: writes its content into an open file that is empty, before the next entry is asked for.
        from_directory: it belongs to a directory or archive, which is merged into the destination.
        keep_owner: it has an owner of its own unless the instruction has one.
        of_tree: then it comes from an image or a stage, and is not a member of an archive.
        passed: a directory on the way to what --parents names.
    """

    entry: tar.Entry
    write: Callable[[int], None]
    from_directory: bool = False
    keep_owner: bool = False
    of_tree: bool = False
    passed: bool = False


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
            yield Incoming(entry, write, group.from_directory, group.keep_owner, group.of_tree, group.passed)
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


# --- into the image -------------------------------------------------------------------------------

_DIRECTORIES = ("", ".", "..")  # what a destination ends in that can be nothing else
_ENTER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES: Final[dict[str, int]] = {
    tar.FIFO: stat.S_IFIFO,
    tar.CHARACTER: stat.S_IFCHR,
    tar.BLOCK_DEVICE: stat.S_IFBLK,
}
_HELD: Final = 128  # directories that are open at once, however deep a tree is
_SHOWN: Final = 80


@dataclass(frozen=True)
class _Rules:
    """What one instruction says about all of its entries."""

    owner: Owner
    destination: str
    into: bool  # a single file goes below the destination
    change_mode: Callable[[int, bool], int] | None
    octal: bool  # it gives a mode, also to the destination; a symbolic one changes those of what is copied


Kept = Callable[[str], int | None]
"""Opens the directory of the step's layer for one that the step has made (`overlay.Layers.kept`)."""


class _Base:
    """Where the entries of a tree go. Directories that entries were written into are kept open.

    A directory that was made here is in the step's own layer as a whole. What is new in it is made there,
    which takes half the time that it takes through an overlay. The overlay need not know: it looks a name up
    when somebody asks for it, and nobody has asked for what did not exist.

    Args:
        root: which links can't leave.
        path: of the destination in it.
        owner: of directories that are missing.
        kept: None where the root is not an overlay.
        replace: an entry takes the place of whatever is there.
    """

    def __init__(
        self, root: Root, path: str, owner: Owner, kept: Kept | None = None, *, replace: bool = False
    ) -> None:
        self.root = root
        self.path = path
        self.replace = replace
        self._owner = owner
        self._kept = kept
        self._made: set[str] = set()
        self._remembered = 0  # bytes, of the directories of the entries and of those that were made
        self._held: dict[str, int] = {}  # the last ones used, by their path; the newest at the end

    def join(self, path: str) -> str:
        return posixpath.join(self.path, path) if path else self.path

    def close(self) -> None:
        """Close the directories: what a path means may have changed."""
        while self._held:
            os.close(self._held.popitem()[1])

    def directory(self, path: str, *, make: bool = True) -> int:
        """Return a descriptor of the directory at `path`, links followed; valid until the next call.

        Args:
            path: absolute in the root and clean.
            make: make it, and the directories above it, where they are missing.
        """
        missing, size = [], 0
        while path != "/" and path not in self._held:
            missing.append(path)
            size += len(path)
            if size > DEEPEST:
                raise StepError(f"{missing[0][:_SHOWN]!r}… is too deep: more than {len(missing)} directories")
            path = posixpath.dirname(path)
        descriptor = self.root.descriptor
        if path != "/":
            descriptor = self._held[path] = self._held.pop(path)
        while missing:
            path = missing.pop()
            descriptor = self._held[path] = self._enter(descriptor, path, make)
            if len(self._held) > _HELD:
                os.close(self._held.pop(next(iter(self._held))))
        return descriptor

    def make(self, path: str) -> None:
        """Make a directory below another that is there; its metadata come later.

        Raises:
            FileExistsError: something is there.
        """
        os.mkdir(posixpath.basename(path), 0o700, dir_fd=self.directory(posixpath.dirname(path)))
        self._note(path)

    def make_directory(self, path: str, metadata: Metadata) -> bool:
        """Make `path` a directory as `Root.make_directory` does; links are followed unless this replaces."""
        replace = self.replace and path != self.path
        made = self.root.make_directory(path, metadata, parents=self._owner, replace=replace)
        if made:
            self.close()  # it may have taken the place of a link
            self._note(path)
        return made

    def _note(self, path: str) -> None:
        self._made.add(path)
        self.remember(len(path))

    def remember(self, size: int) -> None:
        """Count one more directory, with so many bytes of names and extended attributes.

        Raises:
            StepError: there are too many.
        """
        self._remembered += ENTRY_BYTES + size
        if self._remembered > REMEMBERED:
            raise StepError(
                f"too many directories to copy: their names and attributes take more than "
                f"{REMEMBERED >> 20} MiB"
            )

    def _enter(self, parent: int, path: str, make: bool) -> int:
        if path in self._made and self._kept is not None and (kept := self._kept(path)) is not None:
            return kept
        name, metadata = posixpath.basename(path), Metadata(self._owner)
        try:
            return os.open(name, _ENTER, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            os.mkdir(name, 0o755, dir_fd=parent)
            self._note(path)
            descriptor = self._enter(parent, path, make)
            settle(descriptor, metadata)
            return descriptor
        except OSError:
            pass  # a link: the long way, from the top
        if make and self.root.make_directory(path, metadata, parents=self._owner):
            self._note(path)
        with self.root.locate(path) as found:
            return found.open(os.O_RDONLY | os.O_DIRECTORY)

    def free(self, parent: int, name: str) -> bool:
        """Say whether a file may take the place of `name`: nothing is there, or another file."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return True


class Copier:
    """Writes the entries of one COPY or ADD into the image.

    Args:
        root: the image.
        users: its users, for --chown by name.
        command: the instruction.
        kept: None where the image is not an overlay.

    Raises:
        StepError: --chown or --chmod can't be resolved.
    """

    def __init__(self, root: Root, users: Users, command: wire.CopyCommand, kept: Kept | None = None) -> None:
        self._root = root
        self._kept = kept
        self._command = command
        owner = users.owner(command.chown) if command.chown is not None else (0, 0)
        check_mapped(f"--chown={command.chown or '0:0'}", *owner)
        try:
            change_mode = parse_mode(command.chmod) if command.chmod is not None else None
        except ValueError as error:
            raise StepError(str(error)) from error
        into = command.target_is_directory or posixpath.basename(command.target) in _DIRECTORIES
        destination = wire.absolute(command.workdir, command.target)
        octal = (command.chmod or "").isdecimal()
        self._rules = _Rules(owner, destination, into, change_mode, octal)
        self._image = _Base(root, destination, owner, kept)
        self._unpacked: _Base | None = None
        # Times of directories, set at the end because every entry written into one changes it.
        self._directories: dict[str, tuple[_Base, Metadata]] = {}
        self._is_directory = False  # the destination, for certain
        self._at = ""  # the entry at work, below the destination

    def copy(self, entries: Iterable[Incoming]) -> None:
        """Write all entries in their order.

        Raises:
            StepError: an entry can't be written; the message names its place in the image.
            GuestError: the stream failed.
        """
        umask = os.umask(0)  # no other thread of the guest makes files
        try:
            self._copy(entries)
        finally:
            os.umask(umask)
            self._image.close()
            if self._unpacked is not None:
                self._unpacked.close()
                self._unpacked.root.close()

    def _copy(self, entries: Iterable[Incoming]) -> None:
        # Not a context manager: for each of thousands of small files, that takes as long as writing it.
        for entry in entries:
            self._at = ""
            try:
                if entry.from_directory:
                    self._tree_entry(entry)
                else:
                    self._single(entry)
            except OSError as error:
                raise self._explained(error) from error
        for inner, (base, metadata) in sorted(self._directories.items(), reverse=True):
            self._at = inner
            try:
                self._finish_directory(base, inner, metadata)
            except OSError as error:
                raise self._explained(error) from error

    def _explained(self, error: OSError) -> StepError:
        path = posixpath.join(self._rules.destination, self._at).rstrip("/") or "/"
        if isinstance(error, IsADirectoryError):
            return StepError(f"{path}: a directory is there, and a file or link can't replace it")
        if isinstance(error, NotADirectoryError):
            return StepError(f"{path}: a file is where a directory is needed")
        return StepError(f"{path}: {error.strerror or error}")

    # --- placing ------------------------------------------------------------------------------

    def _single(self, entry: Incoming) -> None:
        """A file by itself: into the destination if that is a directory, else under its name."""
        destination, follow = self._rules.destination, True
        if self._is_directory or self._rules.into or self._root.is_directory(destination):
            follow = False  # as BuildKit has it: a link of the file's name is replaced
            if not self._is_directory:
                self._root.make_directory(destination, self._parent(), parents=self._rules.owner)
                self._is_directory = True
            destination = posixpath.join(destination, posixpath.basename(entry.entry.path))
        self._at = destination
        self._write(self._image, entry, destination, follow=follow)

    def _tree_entry(self, entry: Incoming) -> None:
        inner = _inner(entry.entry.path)
        base = self._image if entry.of_tree or not entry.keep_owner else self._archive_base()
        self._at = inner
        if entry.entry.kind == tar.DIRECTORY:
            self._directory(base, entry, inner)
        else:
            self._write(base, entry, base.join(inner))

    def _archive_base(self) -> _Base:
        """An archive is unpacked as if the destination were the root, which BuildKit makes it by chroot(2).

        So links out of the archive, or those of the image that it meets, lead nowhere else; and as containerd
        and Docker do it, a member takes the place of whatever is there, unless both are directories.
        """
        if self._unpacked is None:
            destination = self._rules.destination
            self._root.make_directory(destination, self._parent(), parents=self._rules.owner)
            below = self._root.below(destination)
            self._unpacked = _Base(below, "/", self._rules.owner, self._kept_below(destination), replace=True)
        return self._unpacked

    def _kept_below(self, destination: str) -> Kept | None:
        kept = self._kept
        return kept and (lambda path: kept(posixpath.join(destination, path.lstrip("/"))))

    def _directory(self, base: _Base, entry: Incoming, inner: str) -> None:
        metadata = self._metadata(entry, directory=True)
        if not inner and entry.entry.mode == 0o755 and not self._rules.octal:
            metadata = metadata._replace(mode=None)  # what servers say where nobody has described it
        path = base.join(inner)
        if inner:
            with suppress(FileExistsError):
                base.make(path)
                self._later(base, inner, metadata)
                return
        created = base.make_directory(path, metadata)
        found = base.root.status(path, follow=False)
        # The destination itself keeps what it has; so does a directory that is reached through a link.
        if created:
            self._later(base, inner, metadata)
        elif inner and found is not None and stat.S_ISDIR(found.st_mode):
            if entry.passed:  # as BuildKit has it
                _, made = self._directories.get(inner, (base, Metadata((found.st_uid, found.st_gid))))
                metadata = metadata._replace(owner=made.owner, mode=entry.entry.mode)
            self._later(base, inner, metadata)

    def _later(self, base: _Base, inner: str, metadata: Metadata) -> None:
        """Have a directory's metadata set at the end."""
        base.remember(len(inner) + sum(len(name) + len(value) for name, value in metadata.xattrs.items()))
        self._directories[inner] = (base, metadata)

    def _finish_directory(self, base: _Base, inner: str, metadata: Metadata) -> None:
        path = base.join(inner)
        if not inner:
            base.root.set_directory(path, metadata)
            return
        try:
            parent = base.directory(posixpath.dirname(path), make=False)
            descriptor = os.open(posixpath.basename(path), _ENTER, dir_fd=parent)
        except OSError:
            if base.replace:
                return  # a later member took its place
            raise
        try:
            set_metadata(descriptor, metadata)
        finally:
            os.close(descriptor)

    def _write(self, base: _Base, entry: Incoming, path: str, *, follow: bool = False) -> None:
        """Write what is not a directory."""
        what = entry.entry
        metadata = self._metadata(entry)
        above, name = posixpath.split(path)
        parent = base.directory(above)
        if name and what.kind in (tar.FILE, tar.SYMLINK):
            try:
                if what.kind == tar.FILE:
                    _create(parent, name, entry.write, metadata)
                else:
                    make_link(parent, name, what.linkname, metadata)
                return
            except FileExistsError:
                pass  # it is replaced
        if what.kind == tar.FILE:
            self._replacing(base, parent, name)
            base.root.write(path, entry.write, metadata, follow=follow, replace=base.replace)
            return
        self._replacing(base, parent, name)
        if what.kind == tar.SYMLINK:
            base.root.symlink(path, what.linkname, metadata, replace=base.replace)
        elif what.kind == tar.HARDLINK:
            base.root.hardlink(path, base.join(_inner(what.linkname)), replace=base.replace)
        else:
            self._node(base, path, what, metadata, follow=follow)

    @staticmethod
    def _node(base: _Base, path: str, what: tar.Entry, metadata: Metadata, *, follow: bool) -> None:
        device = os.makedev(*what.device)
        try:
            base.root.node(path, _NODES[what.kind], device, metadata, follow=follow, replace=base.replace)
        except PermissionError as error:
            raise StepError(
                f"{path} is a device node ({what.device[0]}:{what.device[1]}), which can't be made here: the "
                "kernel forbids it outside of a virtual machine"
            ) from error

    @staticmethod
    def _replacing(base: _Base, parent: int, name: str) -> None:
        """Let go of directories that are held where something else than a file is about to be replaced."""
        if not base.free(parent, name or "."):
            base.close()

    def _parent(self) -> Metadata:
        return Metadata(self._rules.owner)

    # --- metadata -----------------------------------------------------------------------------

    def _metadata(self, entry: Incoming, *, directory: bool = False) -> Metadata:
        what, owner = entry.entry, self._rules.owner
        mode = what.mode
        if entry.keep_owner and self._command.chown is None:
            owner = (what.uid, what.gid)
            check_mapped(what.path, *owner)
        # BuildKit unpacks archives with the modes that they have, whatever --chmod says.
        unpacked = entry.keep_owner and not entry.of_tree
        if self._rules.change_mode and not unpacked:
            mode = self._rules.change_mode(mode, directory)
        return Metadata(owner, mode, what.mtime_ns, what.xattrs)


def _inner(path: str) -> str:
    """Return a path of the stream without what would make it leave the destination."""
    if path.startswith("/") or ".." in path.split("/"):
        raise StepError(f"the server sent {path!r}, which leads out of the destination", reason="protocol")
    return path


def _create(parent: int, name: str, fill: Callable[[int], None], metadata: Metadata) -> None:
    """Make a file where nothing is; what is not complete is removed again.

    Raises:
        FileExistsError: something is there.
        OSError: it can't be made or written.
    """
    # Few files have to be given another mode afterwards: there is no umask (`Copier.copy`).
    descriptor = os.open(name, _CREATE, (metadata.mode or 0) & 0o777, dir_fd=parent)
    try:
        fill(descriptor)
        set_metadata(descriptor, metadata)
    except BaseException:
        os.unlink(name, dir_fd=parent)
        raise
    finally:
        os.close(descriptor)
