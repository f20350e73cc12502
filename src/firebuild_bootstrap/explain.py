"""What a failure looks like to whoever wrote the Dockerfile."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from firebuild_bootstrap.errors import Location, StepFailed, exit_status_of, in_words
from firebuild_bootstrap.events import BuildFailed, StepInfo
from firebuild_pki.display import one_line

_REASON_LIMIT: Final = 4000


def explained(
    error: StepFailed, steps: Sequence[StepInfo], total: int, dockerfile: Path, output: Sequence[str]
) -> StepFailed:
    """Return the error with its line, its instruction and what it wrote last.

    Args:
        error: as the guest reported it.
        steps: those of the guest; the error comes back as it is where its step is not among them.
        total: steps of the whole build.
        dockerfile: path that the user named.
        output: last lines of the step.
    """
    step = next((step for step in steps if step.number == error.step), None)
    if step is None:
        return error
    what = _what(error)
    message = f"step {step.number}/{total} failed {what}\n  {one_line(step.instruction)}"
    if output:
        message += "\n  its last output:\n" + "\n".join(f"    {line}" for line in output)
    return StepFailed(
        message,
        step=error.step,
        exit_code=error.exit_code,
        hint=error.hint,
        location=Location(str(dockerfile), step.line),
    )


def failure_event(error: BaseException) -> BuildFailed:
    """Return the event that tells of a build's failure."""
    return BuildFailed(
        exit_status=exit_status_of(error),
        error=type(error).__name__,
        message=str(in_words(error)),
        step=getattr(error, "step", 0),
        exit_code=getattr(error, "exit_code", None),
    )


def _what(error: StepFailed) -> str:
    reason = one_line(error.message, _REASON_LIMIT)
    if not error.exit_code:
        return f"({reason})"
    what = _in_words(error.exit_code)
    if error.exit_code not in (126, 127) or reason.endswith(f"status {error.exit_code}"):
        return what
    return f"{what} ({reason})"  # no command's own status: the guest could not start one, and knows why


def _in_words(exit_code: int) -> str:
    """Say what an exit code means where shells agree on it (POSIX XCU 2.8.2)."""
    text = f"with exit code {exit_code}"
    if exit_code == 126:
        return f"{text}: a command could not be executed"
    if exit_code == 127:
        return f"{text}: a command, or the shell to run it, is not in the image"
    try:
        return f"{text}: {signal.Signals(exit_code - 128).name}"
    except ValueError:
        return text
