"""Files that a build makes outside of its own directory, and that are removed even after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

Note = Callable[[Sequence[str]], None]
"""Writes down a command that cleans up after a build that could not do so itself."""


class OutsideFile:
    """A file that appears complete, and is removed as long as it is still the one that was made.

    Args:
        path: where it appears.
        note: told, before something is made, how to remove it.
    """

    def __init__(self, path: Path, note: Note = lambda _: None) -> None:
        self.path = path
        self._note = note
        self._made: tuple[int, int] | None = None

    def announce_part(self, part: Path) -> None:
        """Say that the file `part` is about to be filled, which will become this one."""
        self._note(["rm", "-f", "--", str(part)])

    def appear(self, part: Path, move: Callable[[Path, Path], None]) -> None:
        """Make the complete file `part` this one with `move`: a rename, or a link.

        Raises:
            OSError: it can't be moved there.
        """
        details = part.stat()
        self._note(["find", str(self.path), "-maxdepth", "0", "-inum", str(details.st_ino), "-delete"])
        move(part, self.path)
        self._made = details.st_dev, details.st_ino

    def stay(self) -> bool:
        """Let the file stay for good; whether it was there to be removed."""
        made, self._made = self._made, None
        return made is not None

    def remove(self) -> None:
        """Remove it, unless it was replaced. Raises nothing; idempotent."""
        made, self._made = self._made, None
        with suppress(OSError):
            details = self.path.lstat()
            if made == (details.st_dev, details.st_ino):
                os.unlink(self.path)
