"""Events about the steps of a build, with their place in the Dockerfile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from firebuild_bootstrap.events import StepFinished, StepStarted
from firebuild_bootstrap.service.session import Session


@dataclass(frozen=True)
class StepInfo:
    """What the events say about a step: its number, its line in the Dockerfile, its text."""

    number: int
    line: int
    instruction: str


class StepEvents:
    """Tells that steps begin and end.

    Args:
        session: takes the events.
        steps: what is known about each.
        total: the number of steps, `FROM` included.
    """

    def __init__(self, session: Session, steps: Sequence[StepInfo], total: int) -> None:
        self._session = session
        self._steps = {step.number: step for step in steps}
        self._total = total

    def started(self, number: int) -> None:
        """A step began."""
        step = self._steps.get(number, StepInfo(number, 0, ""))
        self._session.step_started(number)
        self._session.events(
            StepStarted(step=number, total=self._total, instruction=step.instruction, line=step.line)
        )

    def finished(self, number: int, exit_code: int, seconds: float) -> None:
        """A step ended, `seconds` after its begin."""
        self._session.events(StepFinished(step=number, exit_code=exit_code, seconds=seconds))
