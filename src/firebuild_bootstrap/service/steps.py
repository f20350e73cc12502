"""The steps of a build as the guest reports them: events with their place in the Dockerfile, what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from firebuild_bootstrap.errors import InputError, StepFailed
from firebuild_bootstrap.events import StepFinished, StepInfo, StepStarted
from firebuild_bootstrap.service.outcome import Ending, Outcome, check_status
from firebuild_bootstrap.service.session import Session

_LONGEST: Final = 366 * 24 * 3600.0


class StepEvents:
    """Tells that steps begin and end, and knows which of them are left. Any thread may call.

    Args:
        session: takes the events.
        steps: what is known about each.
        total: the number of steps, `FROM` included.
        stage: what they belong to, where the build has several.
    """

    def __init__(self, session: Session, steps: Sequence[StepInfo], total: int, stage: str = "") -> None:
        self._session = session
        self._steps = {step.number: step for step in steps}
        self._total = total
        self._stage = stage
        self._left = set(self._steps)
        self._begun: set[int] = set()
        self._failed: tuple[int, int] | None = None

    def known(self, number: int) -> int:
        """Return the number of a step that a guest names; 0 is what it says between steps.

        Raises:
            InputError: the build has no such step.
        """
        if number and number not in self._steps:
            raise InputError(f"the guest reports about step {number}, which this build does not have")
        return number

    def started(self, number: int) -> None:
        """A step began; only the first word of it is an event, or a guest could make millions of them."""
        step = self._steps[self.known(number)]
        self._session.step_started(number)
        if number in self._begun:
            return
        self._begun.add(number)
        self._session.events(
            StepStarted(
                step=number,
                total=self._total,
                instruction=step.instruction,
                line=step.line,
                stage=self._stage,
            )
        )

    def finished(self, number: int, exit_code: int, seconds: float) -> None:
        """A step ended, `seconds` after its begin; only the first word of it counts.

        Raises:
            InputError: it can't have ended so.
        """
        check_status(number, exit_code)
        if not 0 <= seconds <= _LONGEST:
            raise InputError(f"the guest says that step {number} took {seconds:g} seconds")
        if number not in self._left:
            return
        self._left.remove(number)
        if exit_code:
            self._failed = self._failed or (number, exit_code)
        self._session.output.finish()
        self._session.events(StepFinished(step=number, exit_code=exit_code, seconds=seconds))

    def success(self) -> Outcome:
        """Return the end of a build whose guest reports success: believed only if nothing is left to do."""
        if self._failed is not None:
            step, exit_code = self._failed
            message = f"the guest reported success, though step {step} ended with status {exit_code}"
        elif self._left:
            step, exit_code = min(self._left), None
            message = f"the guest reported success, but step {step} was not seen to end"
        else:
            return Outcome(ending=Ending.SUCCESS)
        error = StepFailed(message, step=step, exit_code=exit_code)
        return Outcome(ending=Ending.ABORTED, error=error, step=step, exit_code=exit_code, reason="protocol")
