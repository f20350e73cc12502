"""Threads for the network: all end at the first failure, and an interruption waits for none."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from firebuild_bootstrap.errors import FirebuildError, Interrupted
from firebuild_bootstrap.transfers import side_by_side


def test_the_first_failure_ends_what_runs_beside_it() -> None:
    begun, ended = threading.Event(), threading.Event()
    stopped: list[BaseException] = []

    def waits(check: Callable[[], None]) -> None:
        begun.set()
        try:
            while True:
                check()
        except FirebuildError as error:
            stopped.append(error)
            ended.set()

    def fails(check: Callable[[], None]) -> None:
        begun.wait(10)
        raise EOFError

    with pytest.raises(EOFError):
        side_by_side([waits, fails, waits], 2, lambda: None)
    assert ended.wait(10)
    assert [str(error) for error in stopped] == ["it was stopped"]


def test_an_interruption_does_not_wait_for_who_waits() -> None:
    begun, goes_on = threading.Event(), threading.Event()

    def silent(_check: Callable[[], None]) -> None:
        begun.set()
        goes_on.wait(60)

    def check() -> None:
        if begun.is_set():
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        side_by_side([silent], 1, check)
    assert not goes_on.is_set()
    goes_on.set()
