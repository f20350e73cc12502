"""The last that a machine wrote."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import IO, Final

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
