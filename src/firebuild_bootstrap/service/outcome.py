"""How a build ended, as far as its server can tell."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from firebuild_bootstrap.errors import BuildTimeout, FirebuildError, GuestLost, InputError, StepFailed
from firebuild_bootstrap.values import dataclass
from firebuild_pki.display import block

_MAX_STATUS: Final = 255
_MAX_REASON: Final = 4000  # characters of what a guest says about its failure


class Ending(StrEnum):
    """The five ways in which a build ends."""

    SUCCESS = "success"
    ABORTED = "aborted"
    LOST = "lost"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server-error"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a build.

    Args:
        ending: which of the five it is.
        error: what to raise for it; None on success only.
        step: number of the step that failed, 0 where none was running.
        exit_code: exit status of a failed RUN, else None.
        reason: why the guest gave up: `command`, `file`, `protocol` or `internal`; empty from old guests.
    """

    ending: Ending
    error: FirebuildError | None = None
    step: int = 0
    exit_code: int | None = None
    reason: str = ""

    @property
    def message(self) -> str:
        """What happened in words; empty on success."""
        return self.error.message if self.error else ""

    def raise_for_failure(self) -> None:
        """Raise the error of an unsuccessful end.

        Raises:
            FirebuildError: its subclass tells the ending.
        """
        if self.error is not None:
            raise self.error


def aborted(text: str, *, step: int, exit_code: int, reason: str) -> Outcome:
    """Return the end of a build that its guest has given up.

    Args:
        text: why, in its words.
        step: number of the step, 0 between steps.
        exit_code: exit status of its command; of other failures it means nothing.
        reason: see `Outcome`.

    Raises:
        InputError: no command ends with such a status.
    """
    check_status(step, exit_code)
    status = exit_code if reason == "command" else None
    error = StepFailed(block(text, _MAX_REASON) or "the guest gave no reason", step=step, exit_code=status)
    return Outcome(ending=Ending.ABORTED, error=error, step=step, exit_code=status, reason=reason)


def check_status(step: int, exit_code: int) -> None:
    """Refuse what a guest says of the end of a command if no command ends so.

    Raises:
        InputError: it is not from 0 to 255.
    """
    if not 0 <= exit_code <= _MAX_STATUS:
        raise InputError(f"the guest says that step {step} ended with status {exit_code}")


def failure(error: FirebuildError) -> Outcome:
    """Return the outcome that belongs to an error which the guest did not report itself."""
    step = getattr(error, "step", 0)
    match error:
        case GuestLost():
            return Outcome(ending=Ending.LOST, error=error)
        case BuildTimeout():
            return Outcome(ending=Ending.TIMEOUT, error=error)
        case _:
            return Outcome(ending=Ending.SERVER_ERROR, error=error, step=step)
