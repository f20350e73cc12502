"""A copy of what a machine writes to its serial console, for people who want to see what went wrong."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from firebuild_bootstrap.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LIMIT: Final = 16 << 20


def check_copy(path: str | None, setting: str) -> None:
    """Make sure that `open_copy` can work.

    Raises:
        InputError: as there.
    """
    copy = open_copy(path, setting)
    if copy is not None:
        copy.close()


def open_copy(path: str | None, setting: str) -> IO[bytes] | None:
    """Open the file for the copy, where one is named.

    Args:
        path: what the setting says.
        setting: its name, for messages.

    Raises:
        InputError: it can't be written.
    """
    if path is None:
        return None
    try:
        return open(Path(path).expanduser(), "wb", buffering=0)
    except OSError as error:
        raise InputError(f"{setting}: {path} can't be written: {error.strerror}") from error


def copied(source: IO[bytes], copy: IO[bytes] | None, limit: int = _LIMIT) -> IO[bytes]:
    """Return a reader of `source` that writes its first `limit` bytes to `copy` too, and closes both."""
    return source if copy is None else io.BufferedReader(_Copying(source, copy, limit))


class _Copying(io.RawIOBase):
    def __init__(self, source: IO[bytes], copy: IO[bytes], limit: int) -> None:
        self._source: Any = source
        self._copy = copy
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, target: Buffer) -> int:
        piece = self._source.read1(len(memoryview(target)))
        memoryview(target)[: len(piece)] = piece
        with suppress(OSError):  # a full disk must not stop the machine
            self._copy.write(piece[: self._left])
        self._left -= min(len(piece), self._left)
        return len(piece)

    def close(self) -> None:
        self._copy.close()
        self._source.close()
        super().close()
