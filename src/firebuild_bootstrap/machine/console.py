"""What a machine writes: the last of it for messages, and a copy of its serial console for people."""

from __future__ import annotations

import io
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from firebuild_bootstrap.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LIMIT: Final = 64 * 1024


def keep_console(text: str, into: Path) -> None:
    """Write what a machine wrote last to a file in the directory `into`, if there is anything.

    Raises:
        OSError: the disk is full.
    """
    if text.strip():
        (into / "console.log").write_text(text, "utf-8", newline="")


class BoundedLog:
    """Reads a pipe to its end on a thread of its own and keeps the last `limit` bytes."""

    def __init__(self, pipe: IO[bytes], limit: int = _LIMIT) -> None:
        self._pipe = pipe
        self._limit = limit
        self._kept = bytearray()
        self._cut = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, name="firebuild-machine-log", daemon=True)
        self._thread.start()

    def text(self) -> str:
        """Return what is kept, from the start of a line where the beginning was dropped."""
        with self._lock:
            kept, cut = bytes(self._kept), self._cut
        return (kept.partition(b"\n")[2] if cut else kept).decode("utf-8", "replace")

    def finish(self, timeout: float) -> None:
        """Wait up to `timeout` seconds until the last writer is gone."""
        self._thread.join(timeout)

    def _read(self) -> None:
        with self._pipe as pipe:
            while piece := pipe.read1(4096) if hasattr(pipe, "read1") else pipe.read(4096):
                with self._lock:
                    self._kept += piece
                    if len(self._kept) > self._limit:
                        self._cut = True
                        del self._kept[: -self._limit]


# --- a copy of all of it --------------------------------------------------------------------------

_COPY_LIMIT: Final = 16 << 20


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
        return open(os.path.expanduser(path), "wb", buffering=0)
    except OSError as error:
        raise InputError(
            f"{setting}: {path} can't be written: {error.strerror}",
            hint="name a file in a directory of yours",
        ) from error


def copied(source: IO[bytes], copy: IO[bytes] | None, limit: int = _COPY_LIMIT) -> IO[bytes]:
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
