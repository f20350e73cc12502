"""What signals do to a build."""

from __future__ import annotations

import os
import signal

import pytest

from firebuild_bootstrap.errors import ExitStatus, Interrupted
from firebuild_bootstrap.interrupts import SIGNALS, Interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_what_runs_and_is_named(number: signal.Signals) -> None:
    with Interrupts().installed(), pytest.raises(Interrupted, match=number.name) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_status is ExitStatus.INTERRUPTED


def test_a_second_signal_does_not_interrupt_the_clean_up() -> None:
    steps = []
    with Interrupts().installed():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("cleaned up")
    assert steps == ["cleaned up"]


def test_an_atomic_operation_is_finished_first() -> None:
    steps = []
    interrupts = Interrupts()
    with interrupts.installed():
        with pytest.raises(Interrupted), interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("stored")
        assert steps == ["stored"]
        with interrupts.deferred():
            steps.append("and nothing is raised twice")


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts().installed():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
