"""The build context: the files that COPY and ADD may send, and how their sources are found.

https://docs.docker.com/reference/dockerfile/#copy
"""

from __future__ import annotations

import difflib
import os
import posixpath
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from firebuild_bootstrap.context.entries import (
    READABLE,
    ContextPlace,
    ContextResource,
    Entry,
    FetchLimits,
    Group,
    heredoc_group,
)
from firebuild_bootstrap.context.root import ContextRoot, FileRoot, Node, Parts
from firebuild_bootstrap.context.tree import (
    PATTERN,
    ContextFile,
    IgnoreRules,
    Tree,
    excluded_sources,
    exclusions,
    load_rules,
    only,
)
from firebuild_bootstrap.dockerfile.graph import Download, Files, FileSet, GitTree, Heredoc
from firebuild_bootstrap.dockerfile.operations import redacted
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.events import Tasks
from firebuild_bootstrap.matching import BadPattern, Pattern, has_wildcard
from firebuild_bootstrap.removal import remove_tree

if TYPE_CHECKING:
    from firebuild_bootstrap.context.git import Cloned
    from firebuild_bootstrap.sshagent import SshAgent

_SUBDIRECTORY: Final = "the directory after the colon of #REF:DIRECTORY is one of the repository"
# difflib compares with each of them in time proportional to its length: an error must not take seconds.
_COMPARED_NAMES: Final = 10_000


class FileTree:
    """Files that COPY and ADD may take, and what comes from elsewhere with them; close it after use.

    Args:
        root: the files.
        label: what to call it in messages.
        rules: what of it does not exist for the build.
        keeps_owners: files keep their owners unless an instruction has another: a stage's, or an image's.
        downloads, limits, clock_ns, tasks, agent, check: as of `BuildContext`.
    """

    def __init__(
        self,
        root: FileRoot,
        label: str,
        rules: IgnoreRules | None = None,
        *,
        keeps_owners: bool = True,
        downloads: Callable[[], Path] | None = None,
        limits: FetchLimits | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        tasks: Tasks | None = None,
        agent: SshAgent | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._files = root
        self.label = label
        self._place = ContextPlace(f" {root.path}" if isinstance(root, ContextRoot) else "")
        self._rules = rules or IgnoreRules()
        self._keeps_owners = keeps_owners
        self._downloads = downloads
        self._temporary: Path | None = None
        self._limits = limits or FetchLimits()
        self._clock_ns = clock_ns
        self._tasks = tasks or Tasks()
        self._agent = agent
        self._check = check
        self._opened: list[FileRoot] = []

    @property
    def excluded(self) -> Callable[[str], bool] | None:
        """The predicate for sources that the ignore rules leave out; see `excluded_sources`."""
        return excluded_sources(self._rules)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files and remove temporary downloads; may be called again."""
        for root in (self._files, *self._opened):
            root.close()
        if self._temporary is not None:
            remove_tree(self._temporary, ignore_errors=True)

    def resource(
        self,
        sources: Sequence[FileSet],
        *,
        exclude: Sequence[str] = (),
        parents: bool = False,
        unpack: bool | None = False,
        check: bool = True,
        location: Location | None = None,
    ) -> ContextResource:
        """Find what an instruction sends; download what is remote, unless a checksum says what it is.

        Args:
            sources: in the order in which they are written; their trees are not looked at.
            exclude: patterns, as in an ignore file, of what is left out of sources that are directories,
                relative to them.
            parents: paths keep their directories, those after `/./` where that is in them.
            unpack: archives are sent as their members; None for those of this tree and not for downloads.
            check: look at all files, so that what can't be sent is found before anything starts.
            location: the instruction, for errors now and while the files are read later.

        Raises:
            InputError: a source does not exist, or can't be read or downloaded. It is not
                an error that a pattern matches nothing.
        """
        tree = Tree(
            self._files,
            self._rules,
            location,
            label=self.label,
            keeps_owners=self._keeps_owners,
            exclude=exclusions(exclude),
        )
        groups: list[Group] = []
        for source in sources:
            match source:
                case Files(pattern):
                    if parents:
                        found = self._with_parents(pattern, tree, check=check)
                    else:
                        found = self._plain(pattern, tree, unpack=unpack is not False, check=check)
                    groups += (replace(group, source=source) for group in found)
                case Heredoc():
                    groups.append(heredoc_group(source, self._clock_ns()))
                case Download():
                    later = _Later(partial(self._download, source, location, unpack=unpack is True))
                    # A checksum tells whether a step is cached, without the file.
                    if check or not source.checksum:
                        groups.append(replace(later.group(), source=source))
                    else:
                        groups.append(
                            Group(redacted(source.url), later.entries, source, later.group, source.checksum)
                        )
                case GitTree():
                    groups.append(replace(self._repository(source, exclude, location), source=source))
        return ContextResource(tuple(groups))

    def _download(self, source: Download, location: Location | None, *, unpack: bool) -> Group:
        from firebuild_bootstrap.context.downloads import download, remote_group  # few builds have one

        with self._tasks.task(f"downloading from {_host(source.url)}"):
            remote = download(
                source.url,
                self._download_directory(),
                checksum=source.checksum,
                location=location,
                limits=self._limits,
                check=self._check,
            )
        return remote_group(remote, location, unpack=unpack)

    def _repository(self, source: GitTree, exclude: Sequence[str], location: Location | None) -> Group:
        shown = redacted(source.url)
        cloned = _clone(
            source,
            self._download_directory(),
            location,
            self._limits,
            tasks=self._tasks,
            agent=self._agent,
            check=self._check,
        )
        root = ContextRoot(cloned.path)
        self._opened.append(root)
        tree = Tree(
            root, IgnoreRules(), location, label=f"the repository {shown}", exclude=exclusions(exclude)
        )
        node = _wanted(root, source, tree.label, location)
        if not node.is_directory:
            raise InputError(f"{node.path!r:.200} of {tree.label} is not a directory", location=location)
        commit = f"gitCommit:{cloned.commit}"
        group = Group(shown, partial(_directory_entries, tree, node, shown), digest=commit)
        _check(group)
        return group

    def _plain(self, pattern: str, tree: Tree, *, unpack: bool, check: bool) -> Iterator[Group]:
        # A source itself is never left out, whatever --exclude says: its patterns are for what is below.
        for node, name in list(self._find(pattern, tree)):
            yield self._group(tree, node, name, unpack=unpack, check=check)

    def _with_parents(self, pattern: str, tree: Tree, *, check: bool) -> Iterator[Group]:
        pivot, dotted, wanted = pattern.partition("/./")
        if not dotted:
            pivot, wanted = "/", pattern
        below = _clean(wanted)
        if not has_wildcard(pattern):
            self._existing((*_clean(pivot), *below), pattern, tree)
        chosen = replace(tree, select=only("/".join(below)))
        for node, name in list(self._find(pivot, tree)):
            if node.is_directory:
                group = Group(name, partial(_directory_entries, chosen, node, name))
                if check:
                    _check(group)
                # As BuildKit: of a pattern's directories only those count that have something, where another
                # is the destination, which is made whether anything goes into it or not.
                if not has_wildcard(pivot) or len(tuple(islice(group.entries(), 2))) > 1:
                    yield group

    def _download_directory(self) -> Path:
        if self._downloads is not None:
            return self._downloads()
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="firebuild-"))
        return self._temporary

    def _group(self, tree: Tree, node: Node, name: str, *, unpack: bool, check: bool) -> Group:
        if node.is_directory:
            group = Group(name, partial(_directory_entries, tree, node, name))
            if check:
                _check(group)
            return group
        entry = tree.file(node, name)
        if check:
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
        split = next((index for index, part in enumerate(parts) if has_wildcard(part)), len(parts))
        if split == len(parts):
            yield self._existing(parts, text, tree), "/".join(parts) or "."
            return
        try:
            patterns = [Pattern.path(part) for part in parts[split:]]
        except BadPattern as error:
            raise InputError(
                f"the pattern {text!r} is malformed: {error}", hint=PATTERN, location=tree.location
            ) from error
        base = self._existing(parts[:split], text, tree)
        for node in _matching(tree, base, patterns):
            target = self._existing(node.parts, node.path, tree) if node.is_link else node
            yield target, node.path

    def _existing(self, parts: Parts, text: str, tree: Tree) -> Node:
        try:
            return self._resolve(parts, tree)
        except PermissionError as error:
            raise InputError(
                f"{text!r} of {self.label} can't be read: {error.strerror}",
                hint=READABLE,
                location=tree.location,
            ) from error
        except OSError as error:
            raise InputError(
                f"{text!r} is not in {self.label}{self._place.where}",
                hint=self._hint(parts, tree),
                location=tree.location,
            ) from error

    def _resolve(self, parts: Parts, tree: Tree) -> Node:
        node = tree.root.resolve(parts, lambda path: not tree.rules.ignores(path))
        if not tree.visible(node):
            raise FileNotFoundError(node.path)
        return node

    def _hint(self, parts: Parts, tree: Tree) -> str | None:
        if self._place.hint is not None:
            return self._place.hint
        if tree.rules.ignores("/".join(parts)):
            return f"{tree.rules.name} excludes it"
        for length in range(len(parts)):
            # Suggest names of the deepest directory on the path that exists.
            try:
                parent = self._resolve(parts[: len(parts) - 1 - length], tree)
                names = [node.parts[-1] for node in tree.root.children(parent.parts) if tree.visible(node)]
            except (OSError, InputError):
                continue
            name = parts[len(parts) - 1 - length]
            if name in names and (node := tree.root.node((*parent.parts, name))).is_link:
                text = tree.root.read_link(node.parts)
                return f"{node.path!r} is a symbolic link to {text!r:.200}, which leads to nothing there"
            close = difflib.get_close_matches(name, names[:_COMPARED_NAMES], n=3)
            where = f"{parent.path or '.'!r}"
            return f"in {where} there is: {', '.join(close or names[:8]) or 'nothing'}"
        return None


class BuildContext(FileTree):
    """A directory whose files a build may use. Use it as a context manager, or close it.

    Args:
        root: the directory.
        dockerfile: the Dockerfile, beside which `<name>.dockerignore` may lie; None if it is not a file.
        name: of `--build-context`; empty for the main one.
        downloads: returns an existing directory for what ADD downloads; by default a temporary one, removed
            on close.
        limits: how long a download may take.
        clock_ns: nanoseconds since 1970, the modification time of heredoc files.
        tasks: receives the progress of downloads.
        agent: the SSH agent of git; that of the environment by default.
        commit: of the repository that it is a part of; empty where it is a directory of this machine.
        place: what messages say instead of the path of the directory.
        check: called again and again while something is fetched; what it raises ends that.

    Raises:
        InputError: the directory or the ignore file can't be read, or a pattern in it is malformed.
    """

    def __init__(
        self,
        root: Path,
        dockerfile: Path | None = None,
        *,
        name: str = "",
        downloads: Callable[[], Path] | None = None,
        limits: FetchLimits | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        tasks: Tasks | None = None,
        agent: SshAgent | None = None,
        commit: str = "",
        place: ContextPlace | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            ContextRoot(root),
            f"the build context {name!r}" if name else "the build context",
            load_rules(root, dockerfile),
            keeps_owners=False,
            downloads=downloads,
            limits=limits,
            clock_ns=clock_ns,
            tasks=tasks,
            agent=agent,
            check=check,
        )
        self.root = root
        self.commit = commit
        if place is not None:
            self._place = place

    def path_of(self, directory: Path) -> str | None:
        """Return where COPY finds a directory of this host; None if it is elsewhere, or ignored."""
        root, real = self.root.resolve(), directory.resolve()
        inside = real.relative_to(root).as_posix() if real.is_relative_to(root) else ""
        return inside if inside not in ("", ".") and not self._rules.ignores(inside) else None


def _clone(
    source: GitTree,
    directory: Path,
    location: Location | None,
    limits: FetchLimits,
    *,
    tasks: Tasks,
    agent: SshAgent | None,
    check: Callable[[], None],
) -> Cloned:
    from firebuild_bootstrap.context.git import clone  # few builds have one
    from firebuild_bootstrap.sshagent import reachable

    with tasks.task(f"fetching {redacted(source.url)}"), reachable(agent) as environment:
        return clone(
            source, directory, location=location, limits=limits, environment=environment, check=check
        )


def open_named(
    name: str,
    source: Path | GitTree,
    downloads: Callable[[], Path],
    tasks: Tasks,
    *,
    agent: SshAgent | None = None,
    check: Callable[[], None] = lambda: None,
) -> BuildContext:
    """Open what `--build-context NAME=…` names.

    Args:
        name: of the context.
        source: its directory, or a repository that is fetched now.
        downloads: returns an existing directory for that.
        tasks: receives the progress.
        agent: the SSH agent of git; that of the environment by default.
        check: as of `BuildContext`.

    Raises:
        InputError: the directory or its ignore file can't be read, or the repository not be fetched.
    """
    commit = ""
    if isinstance(source, GitTree):
        fetched = fetch_repository(
            source, Location(f"--build-context {name}"), downloads(), tasks, agent=agent, check=check
        )
        source, commit = fetched.path, fetched.commit
    return BuildContext(source, name=name, downloads=downloads, tasks=tasks, commit=commit, check=check)


def fetch_repository(
    source: GitTree,
    location: Location | None,
    directory: Path,
    tasks: Tasks,
    *,
    agent: SshAgent | None,
    check: Callable[[], None],
) -> Cloned:
    """Fetch the repository of a build context; see `git.clone`.

    Args:
        source: the repository, and the directory in it that is wanted.
        location: of its option, for errors.
        directory: an existing directory, where a new one is made for it.
        tasks: receives the progress.
        agent: the SSH agent of git; that of the environment by default.
        check: what it raises ends git.

    Returns:
        the wanted directory, and the commit.

    Raises:
        InputError: it can't be fetched, or the directory is not in it.
    """
    cloned = _clone(source, directory, location, FetchLimits(), tasks=tasks, agent=agent, check=check)
    with closing(ContextRoot(cloned.path)) as inside:
        node = _wanted(inside, source, redacted(source.url), location)
    return replace(cloned, path=cloned.path.joinpath(*node.parts))


def _wanted(root: ContextRoot, source: GitTree, label: str, location: Location | None) -> Node:
    """Find the wanted directory of a repository, inside it, whatever links are there."""
    try:
        return root.resolve(source.subdirectory.split("/"), lambda _: True)
    except OSError as error:
        raise InputError(
            f"{source.subdirectory!r:.200} is not in {label}", hint=_SUBDIRECTORY, location=location
        ) from error


def _host(url: str) -> str:
    """Return the host of a URL that may be malformed, and that may hold a password before it."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2]


def _clean(text: str) -> Parts:
    """Split a source into names, with `..` stopped at the context, before links are looked at (as Docker)."""
    return tuple(part for part in posixpath.normpath("/" + text.lstrip("/")).split("/") if part)


def _matching(tree: Tree, base: Node, patterns: Sequence[Pattern]) -> Iterator[Node]:
    if not base.is_directory or not tree.may_show_below(base):
        return
    for node in tree.children(base):
        if not patterns[0].matches(node.parts[-1]):
            continue
        if len(patterns) == 1:
            if tree.visible(node):
                yield node
        elif node.is_directory:
            yield from _matching(tree, node, patterns[1:])


def _directory_entries(tree: Tree, node: Node, name: str) -> Iterator[Entry]:
    return chain((tree.directory(node, name),), tree.contents(node))


class _Later:
    """A group that is made when somebody asks for it, and once."""

    def __init__(self, make: Callable[[], Group]) -> None:
        self._make = make
        self._made: Group | None = None
        self._lock = threading.Lock()

    def group(self) -> Group:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def entries(self) -> Iterator[Entry]:
        yield from self.group().entries()


def _check(group: Group) -> None:
    """Walk once, so that what can't be sent is found before anything starts."""
    for entry in group.entries():
        _require_readable(entry)


def _require_readable(entry: Entry) -> None:
    # World-readable files need no test, which saves much time in a large tree.
    if entry.file is not None and not entry.mode & stat.S_IROTH:
        os.close(entry.file.descriptor())
