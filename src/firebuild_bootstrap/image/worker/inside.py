"""Creating files below one directory and never outside of it, whatever links the tree contains."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

from firebuild_bootstrap.image.worker.errors import TreeError
from firebuild_bootstrap.layers.root import remove_directory

_MAX_LINKS: Final = 40  # as the kernel, path_resolution(7)
_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Inside:
    """The inside of one directory; symbolic links are followed as if that directory were `/`."""

    def __init__(self, root: str) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._cached: tuple[tuple[str, ...], int] | None = None

    def close(self) -> None:
        """Close all descriptors."""
        self.forget()
        os.close(self._root)

    def forget(self) -> None:
        """Drop the remembered directory: what a path means may have changed."""
        if self._cached is not None:
            os.close(self._cached[1])
            self._cached = None

    def directory(self, parts: tuple[str, ...]) -> int:
        """Return a descriptor of the directory `parts`, made with its parents where missing (0755).

        It belongs to this object and stays valid until the next call.

        Raises:
            TreeError: something on the way is no directory, or links go in circles.
        """
        if not parts:
            return self._root
        if self._cached is None or self._cached[0] != parts:
            found = self._resolve(parts)
            self.forget()
            self._cached = (parts, found)
        return self._cached[1]

    def existing(self, parts: tuple[str, ...]) -> int | None:
        """Open what is a directory at `parts` itself (no link); the caller closes it."""
        if not parts:
            return os.dup(self._root)
        try:
            return os.open(parts[-1], _OPEN_DIRECTORY, dir_fd=self.directory(parts[:-1]))
        except OSError:
            return None

    def clear_way(self, parent: int, name: str) -> None:
        """Remove what is called `name`, with everything in it; descriptors given out before are not valid."""
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            remove_directory(name, parent)
        else:
            os.unlink(name, dir_fd=parent)
        if not stat.S_ISREG(found.st_mode):
            self.forget()

    def _resolve(self, parts: tuple[str, ...]) -> int:
        stack = [os.dup(self._root)]
        try:
            todo = list(reversed(parts))
            links = 0
            while todo:
                name = todo.pop()
                if name == "..":
                    os.close(stack.pop()) if len(stack) > 1 else None
                    continue
                found = _enter(stack[-1], name)
                if isinstance(found, int):
                    stack.append(found)
                    continue
                links += 1
                if links > _MAX_LINKS:
                    raise TreeError(f"/{'/'.join(parts)}: its symbolic links go in circles")
                if found.startswith("/"):
                    _close(stack[1:])
                    del stack[1:]
                todo += [part for part in reversed(found.split("/")) if part not in ("", ".")]
            return stack.pop()
        finally:
            _close(stack)


def _enter(parent: int, name: str) -> int | str:
    """Open the directory `name`, made if missing, or return the text of the link it is."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
    try:
        return os.open(name, _OPEN_DIRECTORY, dir_fd=parent)
    except OSError:
        pass
    try:
        return os.readlink(name, dir_fd=parent)
    except OSError as error:
        raise TreeError(f"{name} is needed as a directory and is none") from error


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
