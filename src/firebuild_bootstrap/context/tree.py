"""What is visible of a tree: its files and directories as entries, but for what `.dockerignore` leaves out.

https://docs.docker.com/build/concepts/context/#dockerignore-files
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from firebuild_bootstrap.context.entries import READABLE, SPECIAL, Entry, changed, checked, unreadable
from firebuild_bootstrap.context.root import ContextRoot, FileRoot, Node
from firebuild_bootstrap.dockerfile.syntax import MOST_TEXT
from firebuild_bootstrap.errors import InputError, Location, reason_of
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.matching import Automaton, BadPattern, IgnorePattern
from firebuild_pki.values import dataclass

MOST_WILD: Final = 10_000
"""Patterns with wildcards of one ignore file: each path is compared with all of them."""
PATTERN: Final = "a backslash before a character takes it as it is: \\[, \\*, \\?"
"""The hint where a pattern is malformed."""


@dataclass(frozen=True)
class _Step:
    """What is known about a directory on the way to a path.

    Args:
        path: the directory, with `/` at its end.
        state: of the automaton, after `path`.
        matched: the rules that cover the directory or one above it.
        ignored: whether it is ignored.
    """

    path: str
    state: int
    matched: frozenset[int]
    ignored: bool


class IgnoreRules:
    """The rules of one ignore file; without patterns nothing is ignored.

    A path takes time in proportion to its own length and that of the rules with wildcards; what was found
    out about its directories is kept for the next path.

    Args:
        text: the ignore file's content.
        name: what to call the file in messages.

    Raises:
        InputError: a pattern is malformed, or there are too many; the location names its line.
    """

    def __init__(self, text: str = "", name: str = ".dockerignore") -> None:
        self.name = name
        self._rules: list[IgnorePattern] = []
        wild = 0
        for line, pattern in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            try:
                rule = IgnorePattern.parse(pattern)
            except BadPattern as error:
                raise InputError(
                    f"the pattern {pattern.strip()!r:.200} is malformed: {error}",
                    hint=PATTERN,
                    location=Location(name, line),
                ) from error
            if rule is None:
                continue
            wild += not rule.is_path
            if wild > MOST_WILD:
                raise InputError(
                    f"it has more than {MOST_WILD} patterns with wildcards",
                    hint="every path is compared with all of them: name directories and files instead",
                    location=Location(name, line),
                )
            self._rules.append(rule)
        # Most rules are plain paths: they are looked up. All others are matched at once.
        self._paths: defaultdict[str, list[int]] = defaultdict(list)
        with_wildcards: list[int] = []
        for number, rule in enumerate(self._rules):
            if not rule.is_path:
                with_wildcards.append(number)
            else:
                self._paths[rule.text].append(number)
        self._kept = sorted(rule.text for rule in self._rules if rule.is_path and rule.keeps)
        self._automaton = Automaton(self._rules[number].tokens for number in with_wildcards)
        self._wild = dict(zip(self._automaton.end, with_wildcards, strict=True))
        self._keeping = sum(
            (1 << end + 1) - (1 << begin)
            for number, begin, end in zip(
                with_wildcards, self._automaton.begin, self._automaton.end, strict=True
            )
            if self._rules[number].keeps
        )
        self._way = [_Step("", self._automaton.start, frozenset(), ignored=False)]

    @property
    def is_empty(self) -> bool:
        """Whether there are no rules."""
        return not self._rules

    @property
    def keeps(self) -> bool:
        """Whether a rule keeps what another may ignore."""
        return any(rule.keeps for rule in self._rules)

    @property
    def excludes_all(self) -> bool:
        """Whether a rule covers everything at once."""
        return any(rule.text in ("*", "**", "**/*") for rule in self._rules)

    def ignores(self, path: str) -> bool:
        """Tell whether the file or directory at `path` (below the context, without links) is ignored."""
        return bool(self._rules) and path != "" and self._go(path).ignored

    def may_keep_below(self, path: str) -> bool:
        """Tell whether a `!` rule may keep something below the ignored directory `path`."""
        below = f"{path}/"
        first = bisect_left(self._kept, below)
        if first < len(self._kept) and self._kept[first].startswith(below):
            return True
        return bool(self._go(path).state & self._keeping)

    def _go(self, path: str) -> _Step:
        """Return what is known about `path`; it and its directories become the way to start from next."""
        way = self._way
        path += "/"
        while not path.startswith(way[-1].path):
            way.pop()
        while (above := way[-1]).path != path:
            name = path[len(above.path) : path.index("/", len(above.path))]
            way.append(self._enter(above, name))
        return way[-1]

    def _enter(self, above: _Step, name: str) -> _Step:
        path = above.path + name
        state = self._automaton.read(above.state, name)
        below = self._automaton.step(state, "/") if state else 0
        own = {number for number in self._matching(path, state) if number not in above.matched}
        if not own:
            return _Step(path + "/", below, above.matched, above.ignored)
        matched: list[int] = []
        ignored = False
        for number in sorted(own | above.matched):
            keeps = self._rules[number].keeps
            # A rule that would change nothing counts as not matched, so below it has to match again:
            # this is how Moby's matcher goes along.
            if keeps == ignored or number not in own:
                matched.append(number)
                ignored = not keeps
        return _Step(path + "/", below, frozenset(matched), ignored)

    def _matching(self, path: str, state: int) -> Iterator[int]:
        yield from self._paths.get(path, ())
        ends = state & self._automaton.accepting
        while ends:
            end = ends & -ends
            yield self._wild[end.bit_length() - 1]
            ends ^= end


def excluded_sources(rules: IgnoreRules) -> Callable[[str], bool] | None:
    """Return the predicate for sources of COPY that are left out, as in BuildKit's check CopyIgnoredFile.

    It says nothing where a rule keeps something, because what a directory then holds can't be known without
    a look at it. The whole context is left out by rules for everything only.
    """
    if rules.is_empty or rules.keeps:
        return None
    return lambda path: (rules.excludes_all if path in (".", "/") else rules.ignores(path)) and path != ""


def exclusions(patterns: Iterable[str]) -> IgnoreRules:
    """Return the rules of `--exclude`, which has no comments.

    Raises:
        InputError: a pattern is malformed.
    """
    lines = (f"\\{pattern}" if pattern.startswith("#") else pattern for pattern in patterns)
    return IgnoreRules("\n".join(lines), "--exclude")


def only(pattern: str) -> IgnoreRules:
    """Return rules that ignore everything but what `pattern` matches and what is below that.

    Raises:
        InputError: the pattern is malformed.
    """
    return IgnoreRules(f"**\n!{pattern}" if pattern else "", "--parents")


def _read(path: Path) -> str:
    # A FIFO in the place of the file must not block the build, nor a device fill the memory.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        content = file.read(MOST_TEXT + 1)
        if len(content) > MOST_TEXT:
            raise OSError(f"it is larger than {MOST_TEXT >> 20} MiB")
        return content.decode("utf-8")


def load_rules(root: Path, dockerfile: Path | None) -> IgnoreRules:
    """Read the ignore file of a build: `<Dockerfile>.dockerignore` wins over `.dockerignore`.

    Args:
        root: the build context.
        dockerfile: the Dockerfile; None when it is not a file (standard input).

    Raises:
        InputError: the file can't be read or a pattern in it is malformed.
    """
    candidates = [root / ".dockerignore"]
    if dockerfile is not None:
        candidates.insert(0, dockerfile.parent / f"{dockerfile.name}.dockerignore")
    for candidate in candidates:
        try:
            text = _read(candidate)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the ignore file can't be read: {reason_of(error)}",
                hint="it is a text file in UTF-8 that this user may read",
                location=Location(str(candidate)),
            ) from error
        return IgnoreRules(text, str(candidate))
    return IgnoreRules()


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
        return node.is_directory and self.may_show_below(node) and next(self.contents(node), None) is not None

    def may_show_below(self, directory: Node) -> bool:
        """Tell whether something below a directory may be visible; else it need not be readable."""
        return not self.rules.ignores(directory.path) or self.rules.may_keep_below(directory.path)

    def contents(self, directory: Node) -> Iterator[Entry]:
        """Yield everything visible below `directory`, parents first, sorted by name in each directory.

        An ignored directory appears only if something below it is visible. What has several names is a file
        under the first of them, and a hard link under the others.

        Raises:
            InputError: something can't be read or is not a file, directory or link.
        """
        with self.root.walking() as root:
            yield from replace(self, root=root)._contents(directory)

    def _contents(self, directory: Node) -> Iterator[Entry]:
        first_names: dict[tuple[int, int], str] = {}
        skipped = len(directory.path) + 1 if directory.parts else 0
        # Each set of rules with the part of a path that it is not about. Most trees have none.
        leaving_out = [
            (rules, start)
            for rules, start in ((self.rules, 0), (self.exclude, skipped), (self.select, skipped))
            if not rules.is_empty
        ]
        # An entry waits in its level until something below it turns out to be visible.
        levels: list[tuple[Iterator[Node], list[Entry]]] = [(self.children(directory), [])]
        while levels:
            node = next(levels[-1][0], None)
            if node is None:
                levels.pop()
                continue
            path, is_directory = node.path, node.is_directory
            ignoring = [(rules, path[start:]) for rules, start in leaving_out if rules.ignores(path[start:])]
            if ignoring and not (
                is_directory and all(rules.may_keep_below(part) for rules, part in ignoring)
            ):
                continue
            entry = self._entry(node, path, path[skipped:])
            if is_directory:
                if any(rules is self.select for rules, _ in ignoring):
                    entry = replace(entry, passed=True)
                levels.append((self.children(node), [entry]))
                if ignoring:
                    continue
            for _, waiting in levels:
                if waiting:
                    yield from waiting
                    waiting.clear()
            if not is_directory:
                yield _linked(entry, node.status, first_names)

    def directory(self, node: Node, name: str) -> Entry:
        """Return the entry of a directory whose contents are merged into the destination.

        The destination is not the directory's copy: made by COPY, it is like any other directory that an
        instruction makes, whatever the mode of the source (0700 where `mktemp -d` made the context).
        """
        return Entry(
            source=name,
            path="",
            kind=tar.DIRECTORY,
            mode=0o755,
            mtime_ns=node.status.st_mtime_ns,
            from_directory=True,
            owner=(0, 0) if self.keeps_owners else None,
        )

    def file(self, node: Node, name: str) -> Entry:
        """Return the entry of a single file that was asked for as `name`.

        Raises:
            InputError: it can't be copied, or its name is not UTF-8.
        """
        self._require_utf8(name, f"the name of {name!r}")
        return self._file(node, source=name, path=posixpath.basename(name), from_directory=False)

    def children(self, node: Node) -> Iterator[Node]:
        """Return what is in a directory.

        Raises:
            InputError: it can't be read.
        """
        try:
            return iter(self.root.children(node.parts))
        except OSError as error:
            raise self.unreadable(node, error) from error

    def _entry(self, node: Node, source: str, path: str) -> Entry:
        if not source.isascii():
            self._require_utf8(source, f"the name of {source!r}")
        if node.is_directory or node.is_link:
            return Entry(
                source=source,
                path=path,
                kind=tar.DIRECTORY if node.is_directory else tar.SYMLINK,
                mode=stat.S_IMODE(node.status.st_mode),
                mtime_ns=node.status.st_mtime_ns,
                from_directory=True,
                link_target=self._link_target(node) if node.is_link else "",
                owner=self._owner(node),
                attributes=None if node.is_link else self._attributes(node),
            )
        return self._file(node, source=source, path=path, from_directory=True)

    def _file(self, node: Node, *, source: str, path: str, from_directory: bool) -> Entry:
        status = node.status
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        # Built once: a context has many files.
        file = ContextFile(self, node) if node.is_file else None
        on_disk = self.root.on_disk
        opened = None if kind in SPECIAL else io.BytesIO if file is None else file.open
        regions = None if file is None or on_disk else self.root.regions(node.parts)
        return Entry(
            source=source,
            path=path,
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            mtime_ns=status.st_mtime_ns,
            from_directory=from_directory,
            owner=self._owner(node),
            device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in SPECIAL else (0, 0),
            size=0 if file is None else status.st_size,
            open=opened,
            file=file if on_disk else None,
            regions=regions,
            stored=None if regions is None else partial(self.root.stored, node.parts),
            attributes=None if file is None or on_disk else self._attributes(node),
        )

    def _attributes(self, node: Node) -> Mapping[str, bytes]:
        try:
            return self.root.attributes(node.parts)
        except OSError as error:
            raise self.unreadable(node, error) from error

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
            hint=READABLE if isinstance(error, PermissionError) else None,
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
                hint="rename it or list it in .dockerignore" if not self.keeps_owners else "rename it",
                location=self.location,
            ) from error


_KINDS: Final[Mapping[int, tar.Kind]] = {
    stat.S_IFREG: tar.FILE,
    stat.S_IFIFO: tar.FIFO,
    stat.S_IFCHR: tar.CHARACTER,
    stat.S_IFBLK: tar.BLOCK_DEVICE,
    stat.S_IFSOCK: tar.FILE,  # an empty one, as in BuildKit
}


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
    if status.st_nlink < 2 or entry.kind != tar.FILE:
        return entry
    first = first_names.setdefault((status.st_dev, status.st_ino), entry.path)
    if first == entry.path:
        return entry
    return replace(entry, kind=tar.HARDLINK, link_target=first, size=0, open=None, file=None)
