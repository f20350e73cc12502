"""Calls into untrusted code, each with a time limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")

_POLL_SECONDS = 0.1
_FAREWELL_SECONDS = 5.0


class Unanswered(Exception):
    """A call did not end in time, or an earlier one has not ended yet, or the thread has ended."""


class _Job(Generic[ResultT]):
    """A call on its way: one lock, held until it has ended. A `Future` costs a quarter of a certificate."""

    def __init__(self, function: Callable[[], ResultT]) -> None:
        self._function = function
        self._ended = threading.Lock()
        self._ended.acquire()
        self._error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self.done = True
            self._ended.release()

    def wait(self, seconds: float) -> None:
        """Wait for the end, or for some seconds; by one thread, once it has ended no more."""
        self._ended.acquire(timeout=seconds)

    def result(self) -> ResultT:
        error, self._error = self._error, None  # its traceback leads to this job: no cycle
        if error is not None:
            raise error
        return self._result


class Worker:
    """A thread that makes calls one after the other.

    A call that does not end cannot be stopped, but it can be left behind: the thread is a daemon,
    so it keeps neither the caller nor the end of the process.

    Args:
        name: of the thread.
        limit: how long a call is waited for.
        check: called again and again while waiting; what it raises ends the wait.
    """

    def __init__(self, name: str, limit: timedelta, check: Callable[[], None]) -> None:
        self._limit = limit.total_seconds()
        self._check = check
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._late: tuple[str, _Job[Any]] | None = None
        self._finished = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(self, doing: str, function: Callable[[], ResultT]) -> ResultT:
        """Call the function in the thread and wait for it.

        Args:
            doing: what goes on, as a noun: "signing the certificate".
            function: what to call; what it raises is raised here.

        Raises:
            Unanswered: it did not end in time, or was not made.
        """
        late = self._left_behind()
        if late is not None:
            raise Unanswered(f"{doing} is not possible: {late} has not ended yet")
        if self._finished:
            raise Unanswered(f"{doing} is not possible after the end")
        job = self._submit(function)
        try:
            return self._wait(doing, job, self._limit, self._check)
        finally:
            if not job.done:
                self._late = (doing, job)

    def finish(self, function: Callable[[], None]) -> None:
        """Make a last call and end the thread.

        A call that has been left behind gets a few seconds to end; then the last one is left behind too.

        Raises:
            Unanswered: the last call did not end in time.
        """
        self._finished = True
        late = self._left_behind()
        job = self._submit(function)
        self._jobs.put(None)
        limit = self._limit if late is None else min(self._limit, _FAREWELL_SECONDS)
        self._wait(late or "the last call", job, limit, lambda: None)
        self._thread.join(_FAREWELL_SECONDS)

    def _left_behind(self) -> str | None:
        """Name the call that was not waited for and goes on; once it has ended, the thread is free again."""
        if self._late is not None and self._late[1].done:
            self._late = None  # with whatever it returned
        return self._late and self._late[0]

    def _submit(self, function: Callable[[], ResultT]) -> _Job[ResultT]:
        job = _Job(function)
        self._jobs.put(job)
        return job

    def _wait(self, doing: str, job: _Job[ResultT], limit: float, check: Callable[[], None]) -> ResultT:
        end = time.monotonic() + limit
        while not job.done:
            check()
            left = end - time.monotonic()
            if left <= 0:
                raise Unanswered(f"{doing} did not end within {limit:g} s")
            job.wait(min(left, _POLL_SECONDS))
        return job.result()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # what it holds must not live until the next call
