"""`.dockerignore`: which files of the build context do not exist for the build.

https://docs.docker.com/build/concepts/context/#dockerignore-files
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.matching import Automaton, BadPattern, IgnorePattern


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
        InputError: a pattern is malformed; the location names its line.
    """

    def __init__(self, text: str = "", name: str = ".dockerignore") -> None:
        self.name = name
        self._rules: list[IgnorePattern] = []
        for line, pattern in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            try:
                rule = IgnorePattern.parse(pattern)
            except BadPattern as error:
                raise InputError(
                    f"the pattern {pattern.strip()!r:.200} is malformed: {error}",
                    location=Location(name, line),
                ) from error
            if rule is not None:
                self._rules.append(rule)
        # Most rules are plain paths: they are looked up. All others are matched at once.
        self._paths: defaultdict[str, list[int]] = defaultdict(list)
        self._above_kept: set[str] = set()
        wild: list[int] = []
        for number, rule in enumerate(self._rules):
            if not rule.is_path:
                wild.append(number)
                continue
            self._paths[rule.text].append(number)
            if rule.keeps:
                self._above_kept.update(_directories(rule.text))
        self._automaton = Automaton(self._rules[number].tokens for number in wild)
        self._wild = dict(zip(self._automaton.end, wild, strict=True))
        self._keeping = sum(
            (1 << end + 1) - (1 << begin)
            for number, begin, end in zip(wild, self._automaton.begin, self._automaton.end, strict=True)
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
        return path in self._above_kept or bool(self._go(path).state & self._keeping)

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
    """Return what tells whether a source of COPY is left out, as BuildKit's check CopyIgnoredFile does.

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


def _directories(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path


def _read(path: Path) -> str:
    # A FIFO in the place of the file must not block the build, nor a device fill the memory.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is no regular file")
        return file.read().decode("utf-8")


def load_rules(root: Path, dockerfile: Path | None) -> IgnoreRules:
    """Read the ignore file of a build: `<Dockerfile>.dockerignore` wins over `.dockerignore`.

    Args:
        root: the build context.
        dockerfile: the Dockerfile; None when it is no file (standard input).

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
                f"the ignore file can't be read: {error}", location=Location(str(candidate))
            ) from error
        return IgnoreRules(text, str(candidate))
    return IgnoreRules()
