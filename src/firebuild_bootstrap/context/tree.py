"""Files and directories of a tree as entries."""

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from firebuild_bootstrap.context.entries import Entry, EntryKind
from firebuild_bootstrap.context.ignore import IgnoreRules
from firebuild_bootstrap.context.reading import changed, checked, unreadable
from firebuild_bootstrap.context.root import ContextRoot, FileRoot, Node, Parts
from firebuild_bootstrap.errors import InputError, Location


@dataclass(frozen=True)
class Tree:
    """What is visible of a tree: all that the ignore rules and an instruction's patterns leave.

    Args:
        root: the files.
        rules: its ignore rules.
        location: the instruction that looks at it, for errors.
        label: what to call it in messages.
        keeps_owners: entries have the owners of their files.
        exclude: what an instruction leaves out; paths are relative to the directory that is copied.
        select: all but what an instruction asks for, in the same way.
    """

    root: FileRoot
    rules: IgnoreRules
    location: Location | None
    label: str = "the build context"
    keeps_owners: bool = False
    exclude: IgnoreRules = field(default_factory=IgnoreRules)
    select: IgnoreRules = field(default_factory=IgnoreRules)

    def visible(self, node: Node) -> bool:
        """Tell whether `node` exists for the build: not ignored, or a directory that holds what is not."""
        if not self.rules.ignores(node.path):
            return True
        return node.is_directory and next(self.contents(node), None) is not None

    def contents(self, directory: Node) -> Iterator[Entry]:
        """Yield everything visible below `directory`, parents first, sorted by name in each directory.

        An ignored directory appears only if something below it is visible. What has several names is a file
        under the first of them, and a hard link under the others.

        Raises:
            InputError: something can't be read or is no file, directory or link.
        """
        with self.root.walking() as root:
            yield from replace(self, root=root)._contents(directory)

    def _contents(self, directory: Node) -> Iterator[Entry]:
        first_names: dict[tuple[int, int], str] = {}
        # An entry waits in its level until something below it turns out to be visible.
        levels: list[tuple[Iterator[Node], list[Entry]]] = [(self._children(directory), [])]
        while levels:
            node = next(levels[-1][0], None)
            if node is None:
                levels.pop()
                continue
            below = "/".join(node.parts[len(directory.parts) :])
            ignoring = [
                rules.may_keep_below(path)
                for rules, path in (
                    (self.rules, node.path),
                    (self.exclude, below),
                    (self.select, below),
                )
                if rules.ignores(path)
            ]
            ignored = bool(ignoring)
            if ignored and not (node.is_directory and all(ignoring)):
                continue
            entry = self._entry(node, directory.parts)
            if node.is_directory:
                levels.append((self._children(node), [entry]))
                if ignored:
                    continue
            for _, waiting in levels:
                yield from waiting
                waiting.clear()
            if not node.is_directory:
                yield _linked(entry, node.status, first_names)

    def directory(self, node: Node, name: str) -> Entry:
        """Return the entry of a directory whose contents are merged into the destination.

        The destination is not the directory's copy: made by COPY, it is like any other directory that an
        instruction makes, whatever the mode of the source (0700 where `mktemp -d` made the context).
        """
        return Entry(
            source=name,
            path="",
            kind=EntryKind.DIRECTORY,
            mode=0o755,
            mtime_ns=node.status.st_mtime_ns,
            from_directory=True,
            owner=(0, 0) if self.keeps_owners else None,
        )

    def file(self, node: Node, name: str) -> Entry:
        """Return the entry of a single file that was asked for as `name`.

        Raises:
            InputError: it is no regular file, or its name is not UTF-8.
        """
        self._require_utf8(name, f"the name of {name!r}")
        return self._file(node, source=name, path=posixpath.basename(name), from_directory=False)

    def _children(self, node: Node) -> Iterator[Node]:
        try:
            return iter(self.root.children(node.parts))
        except OSError as error:
            raise self.unreadable(node, error) from error

    def _entry(self, node: Node, base: Parts) -> Entry:
        path = "/".join(node.parts[len(base) :])
        self._require_utf8(node.path, f"the name of {node.path!r}")
        if node.is_directory or node.is_link:
            return Entry(
                source=node.path,
                path=path,
                kind=EntryKind.DIRECTORY if node.is_directory else EntryKind.SYMLINK,
                mode=stat.S_IMODE(node.status.st_mode),
                mtime_ns=node.status.st_mtime_ns,
                from_directory=True,
                link_target=self._link_target(node) if node.is_link else "",
                owner=self._owner(node),
            )
        return self._file(node, source=node.path, path=path, from_directory=True)

    def _file(self, node: Node, *, source: str, path: str, from_directory: bool) -> Entry:
        if not node.is_file:
            raise InputError(
                f"{node.path!r} is {_describe(node.status.st_mode)}: only files, directories and symbolic "
                "links can be copied",
                hint=f"remove it from {self.label}, or leave it out with --exclude or .dockerignore",
                location=self.location,
            )
        return Entry(
            source=source,
            path=path,
            kind=EntryKind.FILE,
            mode=stat.S_IMODE(node.status.st_mode),
            mtime_ns=node.status.st_mtime_ns,
            from_directory=from_directory,
            size=node.status.st_size,
            owner=self._owner(node),
            open=(file := ContextFile(self, node)).open,
            file=file if isinstance(self.root, ContextRoot) else None,
        )

    def _owner(self, node: Node) -> tuple[int, int] | None:
        return (node.status.st_uid, node.status.st_gid) if self.keeps_owners else None

    def _link_target(self, node: Node) -> str:
        try:
            target = self.root.read_link(node.parts)
        except OSError as error:
            raise self.unreadable(node, error) from error
        self._require_utf8(target, f"the target of the symbolic link {node.path!r}")
        return target

    def unreadable(self, node: Node, error: OSError) -> InputError:
        """Return the error for something that can't be read."""
        return InputError(
            f"{node.path or '.'!r} of {self.label} can't be read: {error.strerror or error}",
            location=self.location,
        )

    def _require_utf8(self, text: str, what: str) -> None:
        if text.isascii():
            return
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{what} is not UTF-8, which the protocol between server and guest needs",
                hint="rename it or list it in .dockerignore",
                location=self.location,
            ) from error


class ContextFile(NamedTuple):
    """A regular file of the build context, which still has to have the size that it had."""

    tree: Tree
    node: Node

    @property
    def status(self) -> os.stat_result:
        """What it was when it was found."""
        return self.node.status

    def open(self) -> io.BufferedReader:
        """Open it for reading, so that a change of its size is noticed.

        Raises:
            InputError: it is gone, replaced, or can't be read.
        """
        try:
            content = self.tree.root.open(self.node.parts)
        except OSError as error:
            raise self.tree.unreadable(self.node, error) from error
        size = self.node.status.st_size
        return checked(content, size, name=repr(self.node.path), location=self.tree.location)

    def descriptor(self) -> int:
        """Open it for reading as it is; the caller closes it.

        Raises:
            InputError: it is gone, replaced, or can't be read.
        """
        root = self.tree.root
        assert isinstance(root, ContextRoot)  # noqa: S101 - no other gives its entries a `file`
        try:
            return root.descriptor(self.node.parts)
        except OSError as error:
            raise self.tree.unreadable(self.node, error) from error

    def changed(self, how: str) -> InputError:
        """Return the error for a file whose content is not what was announced."""
        return changed(repr(self.node.path), how, self.tree.location)

    def unreadable(self, error: OSError) -> InputError:
        """Return the error for one that can't be read to its end."""
        return unreadable(repr(self.node.path), error, self.tree.location)


def _linked(entry: Entry, status: os.stat_result, first_names: dict[tuple[int, int], str]) -> Entry:
    """Return a hard link in place of an entry that is another name of a file."""
    if status.st_nlink < 2 or entry.kind is not EntryKind.FILE:
        return entry
    first = first_names.setdefault((status.st_dev, status.st_ino), entry.path)
    if first == entry.path:
        return entry
    return replace(entry, kind=EntryKind.HARDLINK, link_target=first, size=0, open=None, file=None)


def _describe(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "neither")
