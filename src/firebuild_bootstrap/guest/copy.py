"""COPY and ADD: where each entry goes and what it gets (Dockerfile reference, COPY)."""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from firebuild_bootstrap import wire
from firebuild_bootstrap._proto import rootfs_server_pb2 as pb
from firebuild_bootstrap.layers.root import Metadata, Owner, Root

from .classic import place
from .errors import StepError
from .idmap import check_mapped
from .incoming import Incoming
from .modes import parse_mode
from .users import Users

_DIRECTORIES = ("", ".", "..")  # what a destination ends in that can be nothing else


@dataclass(frozen=True)
class _Rules:
    """What one instruction says about all of its entries."""

    owner: Owner
    destination: str
    into: bool  # a single file goes below the destination
    change_mode: Callable[[int, bool], int] | None


@dataclass(frozen=True)
class _Base:
    """Where the entries of a tree go.

    Args:
        root: which links can't leave.
        path: of the destination in it.
        replace: an entry takes the place of whatever is there.
    """

    root: Root
    path: str
    replace: bool = False

    def join(self, path: str) -> str:
        return posixpath.join(self.path, path)


class Copier:
    """Writes the entries of one COPY or ADD into the image.

    Args:
        root: the image.
        users: its users, for --chown by name.
        command: the instruction.

    Raises:
        StepError: --chown or --chmod can't be resolved.
    """

    def __init__(self, root: Root, users: Users, command: wire.CopyCommand) -> None:
        self._root = root
        self._users = users
        self._command = command
        owner = users.owner(command.chown) if command.chown is not None else (0, 0)
        check_mapped(f"--chown={command.chown or '0:0'}", *owner)
        try:
            change_mode = parse_mode(command.chmod) if command.chmod is not None else None
        except ValueError as error:
            raise StepError(str(error)) from error
        into = command.target_is_directory or posixpath.basename(command.target) in _DIRECTORIES
        destination = wire.absolute(command.workdir, command.target)
        self._rules = _Rules(owner, destination, into, change_mode)
        self._image = _Base(root, destination)
        self._unpacked: _Base | None = None
        # Times of directories, set at the end because every entry written into one changes it.
        self._directories: dict[str, tuple[_Base, Metadata]] = {}

    def copy(self, entries: Iterable[Incoming]) -> None:
        """Write all entries in their order.

        Raises:
            StepError: an entry can't be written; the message names its place in the image.
            GuestError: the stream failed.
        """
        try:
            self._copy(entries)
        finally:
            if self._unpacked is not None:
                self._unpacked.root.close()

    def _copy(self, entries: Iterable[Incoming]) -> None:
        count = 0
        for count, entry in enumerate(entries, 1):  # noqa: B007
            with _explained(self._rules.destination):
                self._entry(entry)
        if not count and not self._command.step:
            # An old server has nothing to say about a source that does not exist.
            raise StepError(f"the server sent no files for {self._command.source!r}: there is no such source")
        for inner, (base, metadata) in sorted(self._directories.items(), reverse=True):
            with _explained(posixpath.join(self._rules.destination, inner)):
                self._finish_directory(base, inner, metadata)

    def _entry(self, entry: Incoming) -> None:
        if not entry.extended:
            self._classic(entry)
        elif entry.header.fromDirectory:
            self._tree_entry(entry)
        else:
            self._single(entry)

    # --- placing ------------------------------------------------------------------------------

    def _single(self, entry: Incoming) -> None:
        """A file by itself: into the destination if that is a directory, else under its name."""
        destination = self._rules.destination
        if self._rules.into or self._root.is_directory(destination):
            name = posixpath.basename(entry.header.entryPath or entry.header.sourcePath)
            self._root.make_directory(destination, self._parent(), parents=self._rules.owner)
            destination = posixpath.join(destination, name)
        with _explained(destination):
            self._write(self._image, entry, destination, follow=True)

    def _tree_entry(self, entry: Incoming) -> None:
        inner = _inner(entry.header.entryPath)
        base = self._image if entry.header.ofTree or not entry.header.keepOwner else self._archive_base()
        with _explained(posixpath.join(self._rules.destination, inner)):
            if entry.header.kind == pb.ENTRY_KIND_DIRECTORY:
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
            self._unpacked = _Base(self._root.below(destination), "/", replace=True)
        return self._unpacked

    def _directory(self, base: _Base, entry: Incoming, inner: str) -> None:
        metadata = self._metadata(entry, directory=True)
        path = base.join(inner)
        created = base.root.make_directory(
            path, metadata, parents=self._rules.owner, replace=base.replace and bool(inner)
        )
        found = base.root.status(path, follow=False)
        # The destination itself keeps what it has; so does a directory that is reached through a link.
        if created or (inner and found is not None and stat.S_ISDIR(found.st_mode)):
            self._directories[inner] = (base, metadata)

    def _finish_directory(self, base: _Base, inner: str, metadata: Metadata) -> None:
        path = base.join(inner)
        if base.replace:
            found = base.root.status(path, follow=False)
            if found is None or not stat.S_ISDIR(found.st_mode):
                return  # a later member took its place
        base.root.set_directory(path, metadata)

    def _write(self, base: _Base, entry: Incoming, path: str, *, follow: bool = False) -> None:
        header = entry.header
        metadata = self._metadata(entry)
        self._make_parents(base.root, path)
        if header.kind == pb.ENTRY_KIND_SYMLINK:
            base.root.symlink(path, header.linkTarget, metadata, replace=base.replace)
        elif header.kind == pb.ENTRY_KIND_HARDLINK:
            base.root.hardlink(path, base.join(_inner(header.linkTarget)), replace=base.replace)
        elif header.kind in (pb.ENTRY_KIND_FILE, pb.ENTRY_KIND_UNSPECIFIED):
            base.root.write(path, entry.content, metadata, follow=follow, replace=base.replace)
        else:
            raise StepError(f"{path}: the server sent an entry of kind {header.kind}", reason="protocol")

    def _make_parents(self, root: Root, path: str) -> None:
        root.make_directory(posixpath.dirname(path), self._parent(), parents=self._rules.owner)

    def _parent(self) -> Metadata:
        return Metadata(self._rules.owner, 0o755)

    # --- metadata -----------------------------------------------------------------------------

    def _metadata(self, entry: Incoming, *, directory: bool = False) -> Metadata:
        header, mode, owner = entry.header, entry.mode, self._rules.owner
        if header.keepOwner and self._command.chown is None:
            owner = (header.uid, header.gid)
            check_mapped(header.entryPath, *owner)
        # BuildKit unpacks archives with the modes that they have, whatever --chmod says.
        unpacked = header.keepOwner and not header.ofTree
        if self._rules.change_mode and not unpacked:
            mode = self._rules.change_mode(mode, directory)
        return Metadata(owner, mode, header.mtimeNs if entry.extended else None)

    # --- old servers --------------------------------------------------------------------------

    def _classic(self, entry: Incoming) -> None:
        """An entry without the extended fields: it carries its own target, user and directory."""
        header = entry.header
        target, workdir, chown = place(self._command, header)
        path = wire.absolute(workdir, target)
        owner = self._users.owner(chown) if chown else self._rules.owner
        check_mapped(f"--chown={chown}", *owner)
        metadata = self._metadata(entry, directory=header.isDir)._replace(owner=owner)
        with _explained(path):
            if header.isDir:
                self._root.make_directory(path, metadata, parents=(0, 0))
                return
            if posixpath.basename(target) in _DIRECTORIES or self._root.is_directory(path):
                path = posixpath.join(path, posixpath.basename(header.sourcePath))
            self._make_parents(self._root, path)
            self._root.write(path, entry.content, metadata, follow=True)


def _inner(path: str) -> str:
    """Return a path of the stream without what would make it leave the destination."""
    if path.startswith("/") or ".." in path.split("/"):
        raise StepError(f"the server sent {path!r}, which leads out of the destination", reason="protocol")
    return path


@contextmanager
def _explained(path: str) -> Iterator[None]:
    path = path.rstrip("/") or "/"
    try:
        yield
    except IsADirectoryError as error:
        raise StepError(f"{path}: a directory is there, and a file or link can't replace it") from error
    except NotADirectoryError as error:
        raise StepError(f"{path}: a file is where a directory is needed") from error
    except OSError as error:
        raise StepError(f"{path}: {error.strerror or error}") from error
