"""Threads for what comes over the network or goes there: an interruption does not wait for a silent peer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

from firebuild_bootstrap.errors import FirebuildError

T = TypeVar("T")
Job = Callable[[Callable[[], None]], None]
"""Gets a function to call at each piece of its work, which may raise."""


def side_by_side(jobs: Sequence[Job], several: int, check: Callable[[], None]) -> None:
    """Do several things at a time; the first failure ends the others, and is raised.

    Nobody waits for a thread that waits for the network: it ends at its next piece.

    Args:
        jobs: what there is to do.
        several: how many at a time.
        check: called again and again; what it raises ends all.
    """
    pending = queue.SimpleQueue[Job]()
    for job in jobs:
        pending.put(job)
    failures: list[BaseException] = []
    ended = threading.Event()
    work = partial(_work, pending, failures, ended)
    count = min(several, len(jobs))
    threads = [threading.Thread(target=work, name=f"transfer-{n}", daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive() and not failures:
                check()
                thread.join(0.05)
    finally:
        ended.set()
    if failures:
        raise failures[0]


def answer_of(ask: Callable[[Callable[[], None]], T], check: Callable[[], None]) -> T:
    """Do one thing as `side_by_side` does several, and return what it returns."""
    answers: list[T] = []
    side_by_side([lambda stopped: answers.append(ask(stopped))], 1, check)
    return answers[0]


def _work(pending: queue.SimpleQueue[Job], failures: list[BaseException], ended: threading.Event) -> None:
    def stopped() -> None:
        if ended.is_set():
            raise FirebuildError("it was stopped")

    with suppress(queue.Empty):
        while not ended.is_set():
            job = pending.get_nowait()
            try:
                job(stopped)
            except BaseException as error:
                failures.append(error)
                return
