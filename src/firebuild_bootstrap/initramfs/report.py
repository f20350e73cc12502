"""What a machine said about its end on the serial console (docs/initramfs.md).

The report explains; it proves nothing. A RUN step with enough rights could write to the console as well.
Whether a build succeeded is what the guest told the bootstrap server.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final, Self

_PREFIX: Final = "firebuild-initramfs: "
_PANIC: Final = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")
_UNPACKING: Final = re.compile(r"Initramfs unpacking failed: ([^\r\n]*)")
_REMEDY: Final = "give the machine 256 MiB of memory, and a kernel that knows the initramfs's compression"
_INTERNAL: Final = 70
_TAIL_LINES: Final = 5


@dataclass(frozen=True)
class GuestReport:
    """How a machine ended.

    Args:
        status: `success`; `failed` (vminit ended with an error); the stage that did not work: `settings`,
            `kernel`, `modules`, `network`, `drive`; `internal` for a fault in the initramfs; `panic` when the
            kernel gave up; `none` when the machine said nothing.
        exit: exit status of vminit, None when it did not run or nothing is known.
        message: why, in words; empty after success.
    """

    status: str
    exit: int | None = None
    message: str = ""

    @property
    def exit_code(self) -> int:
        """The exit status of vminit, or 70 where something around it failed."""
        if self.status in ("success", "failed") and self.exit is not None:
            return self.exit
        return _INTERNAL

    @classmethod
    def parse(cls, serial: str) -> Self:
        """Read the last report out of all that came over the serial console."""
        for line in reversed(serial.splitlines()):
            report = cls._parse_line(line)
            if report is not None:
                return report
        panic = _PANIC.search(serial)
        if panic is not None:
            unpacking = _UNPACKING.search(serial)
            why = (
                f" (the initramfs could not be unpacked: {unpacking[1].strip()}; {_REMEDY})"
                if unpacking
                else ""
            )
            return cls("panic", message=f"the machine's kernel gave up: {panic[1].strip()}{why}")
        tail = [line.strip() for line in serial.splitlines() if line.strip()][-_TAIL_LINES:]
        said = f"; its last words: {' / '.join(tail)}" if tail else ""
        return cls("none", message=f"the machine ended without a report{said}")

    @classmethod
    def _parse_line(cls, line: str) -> Self | None:
        _, found, text = line.partition(_PREFIX)
        if not found:
            return None
        try:
            members = json.loads(text)
        except (ValueError, RecursionError):
            return None  # cut off, or mixed with something else
        if not isinstance(members, dict):
            return None
        status, code, message = (members.get(name) for name in ("status", "exit", "message"))
        if not isinstance(status, str) or not isinstance(message, str):
            return None
        known = isinstance(code, int) and not isinstance(code, bool)
        return cls(status, code if known else None, message)
