"""The build context: the files that COPY and ADD may send, and how their sources are found.

https://docs.docker.com/reference/dockerfile/#copy
"""

from __future__ import annotations

import difflib
import os
import posixpath
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from firebuild_bootstrap.context.download import FetchLimits, fetch
from firebuild_bootstrap.context.entries import Entry
from firebuild_bootstrap.context.ignore import load_rules
from firebuild_bootstrap.context.root import ContextRoot, Node, Parts
from firebuild_bootstrap.context.sources import (
    ContextResource,
    Group,
    InlineSource,
    LocalSource,
    RemoteSource,
    Source,
    inline_group,
    remote_group,
)
from firebuild_bootstrap.context.tree import ContextFile, Tree
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.matching import BadPattern, Pattern, has_wildcard

_COMPARED_NAMES: Final = 10_000


class BuildContext:
    """A directory whose files a build may use. Use it as a context manager, or close it.

    Args:
        root: the directory.
        dockerfile: the Dockerfile, beside which `<name>.dockerignore` may lie; None if it is no file.
        downloads: existing directory for what ADD downloads; by default a temporary one, removed on close.
        limits: how long a download may take.
        clock_ns: nanoseconds since 1970, the modification time of heredoc files.
        tasks: told of downloads.

    Raises:
        InputError: the directory or the ignore file can't be read, or a pattern in it is malformed.
    """

    def __init__(
        self,
        root: Path,
        dockerfile: Path | None = None,
        *,
        downloads: Path | None = None,
        limits: FetchLimits | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        tasks: Tasks | None = None,
    ) -> None:
        self.root = root
        self._directory = ContextRoot(root)
        self._rules = load_rules(root, dockerfile)
        self._downloads = downloads
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._limits = limits or FetchLimits()
        self._clock_ns = clock_ns
        self._tasks = tasks or Tasks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the directory and remove temporary downloads; may be called again."""
        self._directory.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def resource(
        self,
        sources: Sequence[Source],
        *,
        location: Location | None = None,
        unpack: bool = False,
    ) -> ContextResource:
        """Find what an instruction sends; download what is remote.

        Args:
            sources: in the order in which they are written.
            location: the instruction, for errors now and while the files are read later.
            unpack: a local archive is sent as its members (ADD).

        Raises:
            InputError: a source does not exist, or can't be read or downloaded. A pattern that matches
                nothing is none.
        """
        tree = Tree(self._directory, self._rules, location)
        groups: list[Group] = []
        for source in sources:
            match source:
                case LocalSource(text):
                    found = list(self._find(text, tree))
                    groups += [self._group(tree, node, name, unpack) for node, name in found]
                case InlineSource():
                    groups.append(inline_group(source, self._clock_ns()))
                case RemoteSource(url, checksum):
                    with self._tasks.task(f"downloading from {_host(url)}"):
                        remote = fetch(
                            url,
                            self._download_directory(),
                            checksum=checksum,
                            location=location,
                            limits=self._limits,
                        )
                    groups.append(remote_group(remote, location))
        return ContextResource(tuple(groups))

    def _download_directory(self) -> Path:
        if self._downloads is not None:
            return self._downloads
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="firebuild-")
        return Path(self._temporary.name)

    def _group(self, tree: Tree, node: Node, name: str, unpack: bool) -> Group:
        if node.is_directory:
            group = Group(name, partial(_directory_entries, tree, node, name))
            # A first walk, so that what can't be sent is found before anything starts.
            for entry in group.entries():
                _require_readable(entry)
            return group
        entry = tree.file(node, name)
        _require_readable(entry)
        if unpack:
            from firebuild_bootstrap.context.archive import Archive, is_archive  # few builds have one

            file = ContextFile(tree, node)
            with file.open() as content:
                archive = is_archive(content)
            if archive:
                return Group(name, Archive(name, file.open, tree.location).entries)
        return Group(name, lambda: iter((entry,)))

    def _find(self, text: str, tree: Tree) -> Iterator[tuple[Node, str]]:
        parts = _clean(text)
        if not text:
            raise InputError(
                "a source is empty", hint="name . for the whole build context", location=tree.location
            )
        split = next((index for index, part in enumerate(parts) if has_wildcard(part)), len(parts))
        if split == len(parts):
            yield self._existing(parts, text, tree), "/".join(parts) or "."
            return
        try:
            patterns = [Pattern.path(part) for part in parts[split:]]
        except BadPattern as error:
            raise InputError(f"the pattern {text!r} is malformed: {error}", location=tree.location) from error
        try:
            base = self._resolve(parts[:split], tree)
        except OSError:
            return
        for node in _matching(tree, base, patterns):
            target = self._existing(node.parts, node.path, tree) if node.is_link else node
            yield target, node.path

    def _existing(self, parts: Parts, text: str, tree: Tree) -> Node:
        try:
            return self._resolve(parts, tree)
        except PermissionError as error:
            raise InputError(
                f"{text!r} of the build context can't be read: {error.strerror}", location=tree.location
            ) from error
        except OSError as error:
            raise InputError(
                f"{text!r} is not in the build context {self.root}",
                hint=self._hint(parts, tree),
                location=tree.location,
            ) from error

    def _resolve(self, parts: Parts, tree: Tree) -> Node:
        node = tree.root.resolve(parts, lambda path: not tree.rules.ignores(path))
        if not tree.visible(node):
            raise FileNotFoundError(node.path)
        return node

    def _hint(self, parts: Parts, tree: Tree) -> str | None:
        if tree.rules.ignores("/".join(parts)):
            return f"{tree.rules.name} excludes it"
        for length in range(len(parts)):
            # The deepest directory on the way that exists is the one whose names are worth showing.
            try:
                parent = self._resolve(parts[: len(parts) - 1 - length], tree)
                names = [node.parts[-1] for node in tree.root.children(parent.parts) if tree.visible(node)]
            except (OSError, InputError):
                continue
            close = difflib.get_close_matches(parts[len(parts) - 1 - length], names[:_COMPARED_NAMES], n=3)
            where = f"{parent.path or '.'!r}"
            return f"in {where} there is: {', '.join(close or names[:8]) or 'nothing'}"
        return None


def _host(url: str) -> str:
    """Return the host of a URL that may be malformed, and that may hold a password before it."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2]


def _clean(text: str) -> Parts:
    """Split a source into names, with `..` stopped at the context, before links are looked at (as Docker)."""
    return tuple(part for part in posixpath.normpath("/" + text.lstrip("/")).split("/") if part)


def _matching(tree: Tree, base: Node, patterns: Sequence[Pattern]) -> Iterator[Node]:
    try:
        children = tree.root.children(base.parts)
    except OSError:
        return
    for node in children:
        if not patterns[0].matches(node.parts[-1]):
            continue
        if len(patterns) == 1:
            if tree.visible(node):
                yield node
        elif node.is_directory:
            yield from _matching(tree, node, patterns[1:])


def _directory_entries(tree: Tree, node: Node, name: str) -> Iterator[Entry]:
    return chain((tree.directory(node, name),), tree.contents(node))


def _require_readable(entry: Entry) -> None:
    # What everybody may read needs no try, which saves much time in a large tree.
    if entry.file is not None and not entry.mode & stat.S_IROTH:
        os.close(entry.file.descriptor())
