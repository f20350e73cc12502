"""What can end the guest, each with the exit status of `vminit`."""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import Literal

_LONGEST = 4000

Reason = Literal["command", "file", "protocol", "internal"]


class GuestExit(IntEnum):
    """What `vminit` exits with (docs/vminit.md); 128 + N when signal N ended it."""

    SUCCESS = 0
    STEP_FAILED = 1
    BAD_INPUT = 2
    SERVER_LOST = 4
    INTERNAL = 70


def complain(text: str) -> None:
    """Say something on standard error; a server may have sent it, so what a terminal obeys is escaped."""
    shown = (one if one.isprintable() or one == "\n" else ascii(one)[1:-1] for one in text)
    print(f"vminit: {''.join(shown)}", file=sys.stderr)


class GuestError(Exception):
    """Anything that ends the guest in a way that can be explained.

    Args:
        message: what was expected and what was found, 4000 characters at most: a server may have sent
            the value; never a key.
        reason: what kind of failure the server is told.
        exit_code: exit status of a failed RUN, else 0.
        exit_status: what `vminit` exits with.
    """

    default_exit = int(GuestExit.INTERNAL)

    def __init__(
        self,
        message: str,
        *,
        reason: Reason = "internal",
        exit_code: int = 0,
        exit_status: int | None = None,
    ) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]}…{message[-_LONGEST // 2 :]}"
        self.message = message
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code
        self.exit_status = self.default_exit if exit_status is None else exit_status
        self.step = 0
        self.told = False  # on standard error


class InputError(GuestError):
    """An argument or the metadata is wrong, or the metadata service can't be reached."""

    default_exit = int(GuestExit.BAD_INPUT)


class StepError(GuestError):
    """A command could not be executed or failed."""

    default_exit = int(GuestExit.STEP_FAILED)

    def __init__(self, message: str, *, reason: Reason = "file", exit_code: int = 0) -> None:
        super().__init__(message, reason=reason, exit_code=exit_code)


class ServerLost(GuestError):
    """The server can't be reached, is not the one expected, or has gone."""

    default_exit = int(GuestExit.SERVER_LOST)


class ProtocolError(GuestError):
    """The server sent something that the protocol does not allow."""

    default_exit = int(GuestExit.STEP_FAILED)

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="protocol")


class Interrupted(GuestError):
    """A signal asked the guest to end."""

    def __init__(self, signum: int, name: str) -> None:
        super().__init__(f"the guest was ended by {name}", exit_status=128 + signum)
