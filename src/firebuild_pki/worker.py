"""Calls into untrusted code, each with a time limit."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

ResultT = TypeVar("ResultT")

_POLL_SECONDS = 0.1
_FAREWELL_SECONDS = 5.0
_ONE: Final = (1).to_bytes(8, sys.byteorder)


class Unanswered(Exception):
    """A call did not end in time, or an earlier one has not ended yet, or the thread has ended."""


class Forked(Unanswered):
    """This process was forked after the thread was started, which it does not have."""


class _Wakeup:
    """Wakes one thread; an eventfd, as its writer gives the interpreter's lock away while it writes.

    Who releases a lock, or fills a queue, keeps it: the other thread is woken to find the interpreter busy,
    sleeps again, and is woken again. Between two processors that takes as long as a signature.
    """

    _eventfd = -1

    def __init__(self) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._eventfd, select.POLLIN)

    def set(self) -> None:
        os.write(self._eventfd, _ONE)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for `set`, also one from before; by one thread."""
        if seconds is None or self._poll.poll(1000 * seconds):
            os.read(self._eventfd, 8)

    def __del__(self) -> None:
        # Not sooner: a thread that was left behind may still ring, when the number is another file's.
        if self._eventfd >= 0:
            os.close(self._eventfd)


class _Job(Generic[ResultT]):
    """A call on its way."""

    __slots__ = ("_error", "_function", "_result", "done")

    def __init__(self, function: Callable[[], ResultT]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            self.done = True

    def result(self) -> ResultT:
        error, self._error = self._error, None  # its traceback leads to this job: no cycle
        if error is not None:
            raise error
        return self._result


class _Thread(threading.Thread):
    runs_foreign_code = True
    """Whoever owns standard output may keep what is printed here apart from it."""


class Worker:
    """A thread that makes calls one after the other.

    A call that does not end cannot be stopped, but it can be left behind: the thread is a daemon,
    so it keeps neither the caller nor the end of the process.

    Args:
        name: of the thread.
        limit: how long a call is waited for.
        check: called before each call, and again and again while waiting; what it raises ends the wait.
    """

    def __init__(self, name: str, limit: timedelta, check: Callable[[], None]) -> None:
        self._limit = limit.total_seconds()
        self._check = check
        self._jobs: deque[_Job[Any] | None] = deque()
        self._wanted, self._ended = _Wakeup(), _Wakeup()
        self._late: tuple[str, _Job[Any]] | None = None
        self._finished = False
        self._thread = _Thread(
            target=_work, args=(self._jobs, self._wanted, self._ended), name=name, daemon=True
        )

    def call(self, doing: str, function: Callable[[], ResultT]) -> ResultT:
        """Call the function in the thread and wait for it.

        Args:
            doing: what goes on, as a noun: "signing the certificate".
            function: what to call; what it raises is raised here.

        Raises:
            Unanswered: it did not end in time, or was not made.
            Forked: this process was forked meanwhile.
        """
        late = self._left_behind()
        if late is not None:
            raise Unanswered(f"{doing} is not possible: {late} has not ended yet")
        if self._finished:
            raise Unanswered(f"{doing} is not possible after the end")
        if self._is_elsewhere:
            raise Forked(f"{doing} is not possible in a process that was forked later")
        self._check()
        job = _Job(function)
        self._submit(job)
        try:
            return self._wait(doing, job)
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
        if self._is_elsewhere:
            return  # the call is for whoever has the thread
        late = self._left_behind()
        self._jobs.append(job := _Job(function))
        self._submit(None)
        limit = self._limit if late is None else min(self._limit, _FAREWELL_SECONDS)
        self._thread.join(limit)
        if not job.done:
            raise Unanswered(f"{late or 'the last call'} did not end within {limit:g} s")
        job.result()

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the thread was started before this process was forked, which has none of its threads."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def _left_behind(self) -> str | None:
        """Name the call that was not waited for and goes on; once it has ended, the thread is free again."""
        if self._late is not None and self._late[1].done:
            self._late = None  # with whatever it returned
        return self._late and self._late[0]

    def _submit(self, job: _Job[Any] | None) -> None:
        self._jobs.append(job)
        self._wanted.set()
        if self._thread.ident is None:  # the first call, which needs no one to be woken
            self._thread.start()

    def _wait(self, doing: str, job: _Job[ResultT]) -> ResultT:
        end = time.monotonic() + self._limit
        while True:
            self._ended.wait(min(max(0, end - time.monotonic()), _POLL_SECONDS))
            if job.done:
                return job.result()
            if time.monotonic() >= end:
                raise Unanswered(f"{doing} did not end within {self._limit:g} s")
            self._check()


def _work(jobs: deque[_Job[Any] | None], wanted: _Wakeup, ended: _Wakeup) -> None:
    while True:
        wanted.wait()
        while jobs:
            job = jobs.popleft()
            if job is None:
                return
            job.run()
            del job  # what it holds must not live until the next call
            ended.set()
