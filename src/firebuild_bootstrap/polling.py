"""Waiting for descriptors, whatever their numbers: `select.select` refuses those from 1024 on."""

from __future__ import annotations

import math
import select
from typing import Final, Protocol

_LOOK: Final = select.POLLIN | select.POLLPRI


class _File(Protocol):
    def fileno(self) -> int: ...


def readable(*files: int | _File, seconds: float | None = None) -> list[int]:
    """Return the numbers of the descriptors that can be read from without waiting.

    There is data, the end of a file, an ended process (of a pidfd), or an error that reading tells.

    Args:
        files: descriptors, or what has one.
        seconds: how long it waits for the first of them; None is without end.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, _LOOK)
    return [number for number, _ in poll.poll(None if seconds is None else math.ceil(max(seconds, 0) * 1000))]
