"""`.dockerignore`: which files of the build context do not exist for the build.

https://docs.docker.com/build/concepts/context/#dockerignore-files
"""

from __future__ import annotations

import warnings
from pathlib import Path

from e2b_dockerfile_utils import PatternMatcher

from firebuild_bootstrap.errors import InputError, Location


class IgnoreRules:
    """The rules of one ignore file; without patterns nothing is ignored.

    Args:
        text: the ignore file's content.
        name: what to call the file in messages.

    Raises:
        InputError: a pattern is malformed; the location names its line.
    """

    def __init__(self, text: str = "", name: str = ".dockerignore") -> None:
        patterns = text.removeprefix("\ufeff").splitlines()
        # `[[a]` is fine here, but Python's regular expressions warn about it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            for line, pattern in enumerate(patterns, 1):
                try:
                    PatternMatcher([pattern])
                except ValueError as error:
                    raise InputError(str(error), location=Location(name, line)) from error
            self._matcher = PatternMatcher(patterns)
        self._any = bool(self._matcher.patterns)
        self.name = name

    def ignores(self, path: str) -> bool:
        """Tell whether the file or directory at `path` (below the context, without links) is ignored."""
        return self._any and path != "" and self._matcher.matches(path)

    def may_keep_below(self, path: str) -> bool:
        """Tell whether a `!` rule may keep something below the ignored directory `path`."""
        return self._matcher.may_match_under(path)


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
            text = candidate.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"the ignore file can't be read: {error}", location=Location(str(candidate))
            ) from error
        return IgnoreRules(text, str(candidate))
    return IgnoreRules()
