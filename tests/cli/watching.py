"""Looks for secrets wherever a build could leave them, for as long as it runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cli.processes import descendants, read

_INTERVAL: Final = 0.01


class Watch:
    """Collects what this process' children and the files below some directories hold.

    Files are read again whenever they change; a directory that comes and goes within a hundredth of a
    second may be missed.
    """

    def __init__(self, directories: Iterable[Path]) -> None:
        self._directories = tuple(directories)
        self._seen: set[tuple[str, int, int]] = set()
        self._needles: dict[str, bytes] = {}
        self._pieces: dict[tuple[str, bytes], None] = {}

    def expect(self, name: str, needle: bytes) -> None:
        """Name something to look for; what was collected before is searched as well."""
        self._needles[name] = needle

    @contextmanager
    def running(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._run, args=(done,))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._look()

    def places(self, name: str) -> set[str]:
        """Where a needle was: `file`, `cmdline` or `environ`."""
        needle = self._needles[name]
        return {place for place, content in self._pieces if needle in content}

    def _run(self, done: threading.Event) -> None:
        while not done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        for pid in descendants():
            for name in ("cmdline", "environ"):
                self._pieces[name, read(pid, name)] = None
        for directory in self._directories:
            for path in _files(directory):
                self._read(path)

    def _read(self, path: Path) -> None:
        try:
            details = path.lstat()
            key = (str(path), details.st_mtime_ns, details.st_size)
            if key in self._seen:
                return
            self._seen.add(key)
            self._pieces["file", path.read_bytes()] = None
        except OSError:
            return


def _files(directory: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path
