"""What of a tree is needed to take files from it: a COPY of one file must not read all of an image."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable

from firebuild_bootstrap.matching import has_wildcard

_MAX_LINKS = 40  # as many as Linux follows for one path (path_resolution(7))


class Taken:
    """The paths that patterns name in a tree, all below them, and what is passed on the way.

    Links are followed inside of the tree. It may hold more than needed: whoever takes the files looks again.

    Args:
        root: the tree, which nobody changes.
        patterns: those of `dockerfile.graph.Files`.
    """

    def __init__(self, root: str, patterns: Iterable[str]) -> None:
        self._root = root
        self._whole: set[str] = set()
        self._passed = {""}
        self._matched: set[str] = set()
        for pattern in patterns:
            self._follow(pattern)

    def __contains__(self, path: object) -> bool:
        """Whether something is among it."""
        if path in self._passed:
            return True
        above = str(path)
        while above and above not in self._whole:
            above = above.rpartition("/")[0]
        return above in self._whole

    def _follow(self, pattern: str, at: str = "") -> None:
        ahead = deque(pattern.split("/"))
        links = 0
        while ahead:
            name = ahead.popleft()
            if name in ("", "."):
                continue
            if name == "..":
                at = at.rpartition("/")[0]
                continue
            if has_wildcard(name) or "\\" in name:
                self._match(at, last=not any(ahead))
                return
            path = f"{at}/{name}" if at else name
            self._passed.add(path)
            try:
                target = os.readlink(f"{self._root}/{path}")
            except OSError:  # it is no link, or not there
                at = path
                continue
            links += 1
            if links > _MAX_LINKS:
                return
            at = "" if target.startswith("/") else at
            # What looks like a wildcard in the text of a link is none; then everything is taken, which does.
            ahead.extendleft(reversed(target.split("/")))
        self._whole.add(at)

    def _match(self, at: str, *, last: bool) -> None:
        """Take all that a wildcard in the directory `at` may mean."""
        if not last:  # what matches may be links to anywhere
            self._whole.add("")
            return
        if at in self._matched:  # a link may be called as its text
            return
        self._matched.add(at)
        self._whole.add(at)
        try:
            names = os.listdir(f"{self._root}/{at}")
        except OSError:
            return
        for name in names:
            if os.path.islink(f"{self._root}/{at}/{name}"):
                if has_wildcard(name):
                    self._whole.add("")
                else:
                    self._follow(name, at)
