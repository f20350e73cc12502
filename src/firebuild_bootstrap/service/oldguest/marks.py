"""The marks that the scripts write among the output of a step, and how they are found again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# The longest marks carry what `dd` reads at once, 64 KiB, in base64.
_MOST_HELD: Final = 1024 * 1024


@dataclass(frozen=True)
class Mark:
    """One mark: `B` a step began, `D` it wrote something (value: base64), `E` it ended (value: exit status),
    `X` it failed (value: why), `P` the image has what is needed. `ends_line` tells whether its line feed came
    along.
    """

    kind: str
    step: int
    value: str
    ends_line: bool


class MarkReader:
    """Separates marks from output, also where a mark is cut in two.

    Args:
        nonce: what begins the marks of this build.
    """

    def __init__(self, nonce: str) -> None:
        self._begin = f"\x01{nonce}:"
        self._mark = re.compile(f"{self._begin}([A-Z]):([0-9]{{1,9}}):([^\x02]*)\x02(\n?)")
        self._held = ""

    def feed(self, text: str) -> Iterator[str | Mark]:
        """Yield output and marks in their order; what may be the begin of a mark is held back."""
        text, self._held = self._held + text, ""
        end = 0
        for found in self._mark.finditer(text):
            if found.start() > end:
                yield text[end : found.start()]
            yield Mark(found[1], int(found[2]), found[3], found[4] != "")
            end = found.end()
        rest = text[end:]
        self._held = rest[self._cut(rest) :]
        if output := rest[: len(rest) - len(self._held)]:
            yield output

    def _cut(self, text: str) -> int:
        begin = text.rfind("\x01")
        tail = text[begin:]
        whole = tail.startswith(self._begin) and "\x02" not in tail and len(tail) <= _MOST_HELD
        return begin if begin >= 0 and (whole or self._begin.startswith(tail)) else len(text)

    @property
    def holding(self) -> bool:
        """Whether the begin of a mark is held back."""
        return bool(self._held)

    def rest(self) -> str:
        """Return what was held back after all: it was no mark."""
        held, self._held = self._held, ""
        return held
