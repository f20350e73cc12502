"""Removing untrusted file trees: of any depth and size, and nothing outside of them.

`shutil.rmtree` of some Pythons recurses and fails on a tree of a thousand levels. This walk is a loop that
holds a few descriptors at a time, however deep it is, and names everything relative to one of them, so that
no path grows too long (PATH_MAX) and no link leads out. `python -m firebuild_bootstrap.removal PATH` does it
in a sandbox, where the owners of all files exist.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_DIRECTORY: Final = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_HELD: Final = 10_000
"""Names of subdirectories that are held of one directory at a time; with more, it is read again."""

_Identity = tuple[int, int]


class _Level:
    """A directory on the way down: its name above, what it is, and the subdirectories still to go."""

    __slots__ = ("complete", "identity", "name", "rest")

    def __init__(self, name: str, identity: _Identity) -> None:
        self.name = name
        self.identity = identity
        self.rest: list[str] = []
        self.complete = True


def remove_tree(path: Path | str, *, ignore_errors: bool = False) -> None:
    """Remove `path` and everything below it; nothing happens when it does not exist.

    Links are removed, not followed. Directories that their owner may not change are opened up first. Other
    file systems that are mounted below are left alone. What can't be removed does not keep the rest from it.

    Args:
        ignore_errors: leave what can't be removed without a word.

    Raises:
        OSError: the first thing that could not be removed; `filename` says which.
    """
    above, name = os.path.split(os.path.abspath(path))
    try:
        parent = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError:
        if ignore_errors:
            return
        raise
    problem = _Removal(above, parent).run(name)
    if problem is not None and not ignore_errors:
        raise problem


class _Removal:
    def __init__(self, above: str, parent: int) -> None:
        self._above = above
        self._here = parent
        self._levels = [_Level("", _identity(os.fstat(parent)))]
        self._device: int | None = None
        self.problem: OSError | None = None

    def run(self, name: str) -> OSError | None:
        """Remove `name` and return the first problem."""
        try:
            self._remove(name)
            while len(self._levels) > 1 or self._levels[0].rest:
                self._step()
        except OSError as error:  # the way up is gone
            self._note(error, "")
        finally:
            os.close(self._here)
        return self.problem

    def _step(self) -> None:
        level = self._levels[-1]
        if level.rest:
            self._descend(level.rest.pop())
        elif not level.complete and self.problem is None:
            self._read(level)
        else:
            self._ascend()

    def _remove(self, name: str) -> None:
        """Unlink what is not a directory; note a directory for later."""
        try:
            os.unlink(name, dir_fd=self._here)
        except FileNotFoundError:
            return
        except OSError as error:
            # unlink(2) says EISDIR for a directory on Linux, EPERM elsewhere and in some file systems.
            if self._is_directory(name):
                self._levels[-1].rest.append(name)
            else:
                self._note(error, name)

    def _is_directory(self, name: str) -> bool:
        with suppress(OSError):
            return stat.S_ISDIR(os.stat(name, dir_fd=self._here, follow_symlinks=False).st_mode)
        return False

    def _descend(self, name: str) -> None:
        try:
            below = self._open(name)
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(error, name)
            return
        os.close(self._here)
        self._here = below
        level = _Level(name, _identity(os.fstat(below)))
        self._levels.append(level)
        self._read(level)

    def _open(self, name: str) -> int:
        found = os.open(name, _DIRECTORY | os.O_PATH, dir_fd=self._here)
        try:
            status = os.fstat(found)
            if self._device is None:
                self._device = status.st_dev
            if status.st_dev != self._device:
                raise OSError(errno.EBUSY, "another file system is mounted there")
            if status.st_mode & 0o700 != 0o700:
                # Through the descriptor, as chmod(2) by name would follow a link that takes its place.
                with suppress(OSError):
                    os.chmod(f"/proc/self/fd/{found}", 0o700)
        except BaseException:
            os.close(found)
            raise
        return found

    def _read(self, level: _Level) -> None:
        level.complete = True
        try:
            with self._opened() as readable, os.scandir(readable) as entries:
                for entry in entries:
                    if len(level.rest) >= _MAX_HELD:
                        level.complete = False
                        return
                    if entry.is_dir(follow_symlinks=False):
                        level.rest.append(entry.name)
                    else:
                        self._remove(entry.name)
        except OSError as error:
            self._note(error, "")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(".", _DIRECTORY | os.O_RDONLY, dir_fd=self._here)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _ascend(self) -> None:
        level = self._levels.pop()
        above = os.open("..", _DIRECTORY | os.O_PATH, dir_fd=self._here)
        os.close(self._here)
        self._here = above
        if _identity(os.fstat(above)) != self._levels[-1].identity:
            raise OSError(errno.ESTALE, "it was moved away while it was removed")
        try:
            os.rmdir(level.name, dir_fd=above)
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(error, level.name)

    def _note(self, error: OSError, name: str) -> None:
        if self.problem is None:
            names = [level.name for level in self._levels[1:]]
            path = os.path.join(self._above, *names, name).rstrip("/")
            self.problem = OSError(error.errno, error.strerror, path)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def main(paths: list[str]) -> int:
    """Remove all `paths`; complain on standard error."""
    failed = 0
    for path in paths:
        try:
            remove_tree(path)
        except OSError as error:
            print(f"{error.filename}: {error.strerror}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
