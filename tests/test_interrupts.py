"""What signals do to a build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from firebuild_bootstrap.cli.failure import SIGNALS, Interrupts
from firebuild_bootstrap.errors import ExitStatus, Interrupted


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_at_the_next_check_and_named(number: signal.Signals) -> None:
    interrupts = Interrupts()
    with interrupts.installed():
        interrupts.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=number.name) as caught:
            interrupts.check()
    assert caught.value.exit_status is ExitStatus.INTERRUPTED


def test_an_interruption_is_not_taken_for_an_error_of_a_plugin() -> None:
    assert not issubclass(Interrupted, Exception)


def test_after_an_interruption_signals_are_ignored_until_the_process_has_gone() -> None:
    with Interrupts().installed():
        os.kill(os.getpid(), signal.SIGINT)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from firebuild_bootstrap.cli.failure import Interrupts\n"
        "with Interrupts().installed():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)
    assert done.returncode == ExitStatus.INTERRUPTED
    assert b"interrupted again" in done.stderr


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts().installed():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
