"""How a machine ended: its failures, and the report on the serial console (docs/initramfs.md)."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import NamedTuple

PREFIX = "firebuild-initramfs: "
VERSION = 1
_MAX_MESSAGE = 1000
_CONSOLE = "/dev/console"


class InitError(Exception):
    """A stage of the init failed.

    Args:
        status: which one; the word of the report (docs/initramfs.md).
        message: what was expected and what was found.
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Report(NamedTuple):
    """How a machine ended.

    Args:
        status: `success`, `failed`, or the stage that did not work.
        exit: exit status of vminit; None when it did not run.
        message: why, in words.
    """

    status: str
    exit: int | None = None
    message: str = ""

    def line(self) -> str:
        """Write the report as one line of ASCII."""
        members = {"version": VERSION, **self._asdict(), "message": self.message[:_MAX_MESSAGE]}
        return f"{PREFIX}{json.dumps(members)}"


def say(text: str, console: str = _CONSOLE) -> None:
    """Write a text to the console and wait until it is out; a machine without one stays silent."""
    with suppress(OSError):
        descriptor = os.open(console, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            # Starts on a line of its own, whatever stands there; more than a terminal's buffer is too long.
            data = memoryview(f"\n{text}\n".encode("ascii", "replace"))
            while data:
                data = data[os.write(descriptor, data) :]
            _drain(descriptor)
        finally:
            os.close(descriptor)


def _drain(descriptor: int) -> None:
    import termios

    with suppress(termios.error):  # no terminal
        termios.tcdrain(descriptor)
