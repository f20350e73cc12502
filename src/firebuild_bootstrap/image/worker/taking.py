"""Selects what a COPY --from needs of a tree: a COPY of one file must not read all of an image."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from firebuild_bootstrap.layers.root import Root
from firebuild_bootstrap.matching import has_wildcard

_NOWHERE = (FileNotFoundError, NotADirectoryError)


class Taken:
    """The paths that patterns name in a tree, all below them, and what is passed on the way.

    Links are followed inside of the tree. It may hold more than needed: whoever takes the files looks again.

    Args:
        root: the tree, which nobody changes.
        patterns: those of `dockerfile.graph.Files`.
    """

    def __init__(self, root: str, patterns: Iterable[str]) -> None:
        self._whole: set[str] = set()
        self._passed = {""}
        self._matched: set[str] = set()
        with Root(root) as tree:
            for pattern in patterns:
                self._take("", pattern.split("/"), tree)

    def __contains__(self, path: object) -> bool:
        """Whether something is among it."""
        if path in self._passed:
            return True
        above = str(path)
        while above and above not in self._whole:
            above = above.rpartition("/")[0]
        return above in self._whole

    def _take(self, above: str, names: list[str], tree: Root) -> None:
        """Take what a pattern, as its names, means in the directory `above`."""
        wild = [index for index, name in enumerate(names) if has_wildcard(name) or "\\" in name]
        path = "/".join([above, *(names[: wild[0]] if wild else names)])
        at = self._follow(path, tree)
        if at is None or tree.status(at) is None:
            if not above:
                self._take_names(path, tree)
            return
        below = names[wild[0] + 1 :] if wild else []
        if not wild:
            self._whole.add(at)
        elif not {".", ".."}.isdisjoint(below) or any("**" in name for name in names):
            self._whole.add("")  # links of a match before `/./` may lead to anywhere
        elif any(below):  # links on the way to a match are not followed
            for name in self._directories(at, tree):
                self._take(f"{at}/{name}", below, tree)
        elif at not in self._matched:
            self._matched.add(at)
            self._whole.add(at)
            self._follow_links(at, tree)

    @staticmethod
    def _directories(at: str, tree: Root) -> list[str]:
        try:
            with tree.below(at) as directory, os.scandir(directory.descriptor) as found:
                return [each.name for each in found if each.is_dir(follow_symlinks=False)]
        except _NOWHERE:
            return []

    def _take_names(self, path: str, tree: Root) -> None:
        """Take what is in the deepest directory of a path that leads to nothing: the error names it."""
        while path:
            path = path.rpartition("/")[0]
            at = self._follow(path, tree)
            if at is not None and tree.is_directory(at):
                with tree.below(at) as directory:
                    self._passed |= {f"{at}/{name}".lstrip("/") for name in os.listdir(directory.descriptor)}
                return

    def _follow_links(self, at: str, tree: Root) -> None:
        """Take what links in the directory `at` lead to, any of which a wildcard may mean."""
        try:
            with tree.below(at) as directory:
                links = [each.name for each in os.scandir(directory.descriptor) if each.is_symlink()]
        except _NOWHERE:
            return
        for name in links:
            if (target := self._follow(f"{at}/{name}", tree)) is not None:
                self._whole.add(target)

    def _follow(self, path: str, tree: Root) -> str | None:
        """Return where a path leads; None for nowhere."""
        passed = [path]
        try:
            with tree.locate(path, passed=passed) as place:
                passed.append(place.path)
                return place.path.strip("/")
        except OSError as error:
            if isinstance(error, _NOWHERE) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                return None
            raise  # too many open files, say: what is there must not be left out
        finally:
            for each in passed:
                above = each.strip("/")
                while above not in self._passed:
                    self._passed.add(above)
                    above = above.rpartition("/")[0]
