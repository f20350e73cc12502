"""A receiver of events may be anybody's: what it raises ends the build with an error, once."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from firebuild_bootstrap.errors import FirebuildError
from firebuild_bootstrap.events import Event, Notice
from firebuild_bootstrap.service.reporting import SerialSink


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (asyncio.CancelledError(), "CancelledError"),
        (SystemExit(3), "SystemExit: 3"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
        (Mute(), "Mute: (a Mute that does not say more)"),
        (OSError("\x1b[31m\nred"), r"OSError: \x1b[31m red"),
    ],
)
def test_whatever_a_receiver_raises_is_told_once(error: BaseException, words: str) -> None:
    calls: list[Event] = []
    failures: list[FirebuildError] = []

    def receive(event: Event) -> None:
        calls.append(event)
        raise error

    sink = SerialSink(receive, failures.append)
    for text in ("one", "two"):
        sink(Notice(level="info", message=text))
    assert len(calls) == 1
    assert [one.message for one in failures] == [f"the receiver of the build's events failed: {words}"]


def test_an_interruption_by_the_user_goes_through() -> None:
    def receive(event: Event) -> None:
        raise KeyboardInterrupt

    failures: list[FirebuildError] = []
    with pytest.raises(KeyboardInterrupt):
        SerialSink(receive, failures.append)(Notice(level="info", message="one"))
    assert failures == []


def test_a_receiver_that_means_to_interrupt_in_a_thread_of_the_server_ends_the_build() -> None:
    def receive(event: Event) -> None:
        raise KeyboardInterrupt

    failures: list[FirebuildError] = []
    sink = SerialSink(receive, failures.append)
    with ThreadPoolExecutor() as pool:
        pool.submit(sink, Notice(level="info", message="one")).result()
    assert [one.message for one in failures] == [
        "the receiver of the build's events failed: KeyboardInterrupt"
    ]
