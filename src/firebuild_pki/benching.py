"""What a configured CA can do: certificates a second, and how long each takes, by threads and processes.

It really issues: for builds that do not exist, whose ids begin with `bench-`.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import re
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field
from datetime import timedelta
from enum import StrEnum
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final

from firebuild_pki.authority import Authority, open_authority
from firebuild_pki.config import CASettings
from firebuild_pki.connections import traffic
from firebuild_pki.display import one_line
from firebuild_pki.errors import CAError
from firebuild_pki.values import dataclass

HOPELESS: Final = 5
"""Failures one after the other, after which a thread asks no more: the backend is away, or refuses."""

_KINDS: Final = 20
_FAREWELL: Final = 30.0
_START: Final = 120.0
_OF_ONE_BUILD: Final = re.compile(r"bench-[0-9a-f]{6}-\d+|\b[0-9a-f]{16,}\b")


class Work(StrEnum):
    """What is done again and again."""

    BUILD = "build"
    SERVER = "server"
    GUEST = "guest"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to do, and how much of it at once.

    Args:
        work: `BUILD` opens the authority, issues for server and guest, and closes it, as each build does; the
            others issue from an authority that stays open, one for each thread.
        count: how often.
        concurrency: threads in each process.
        processes: processes; with one the threads are in this process.
        duration: after which nothing more is begun; None for no end but the count.
    """

    work: Work = Work.BUILD
    count: int = 100
    concurrency: int = 1
    processes: int = 1
    duration: timedelta | None = None

    @property
    def certificates(self) -> int:
        """How many certificates the whole plan takes."""
        return self.count * (2 if self.work is Work.BUILD else 1)


@dataclass(frozen=False, slots=True)
class Tally:
    """What was done, and what it took.

    Args:
        certificates: seconds that each took, its key and all checks included.
        builds: seconds of each build: open, both certificates, close.
        errors: how often, by what they said.
        warnings: of the authorities.
        requests: over the HTTP client that providers share; what libraries of a cloud send is not seen.
        sent: bytes in these, TLS not counted.
        received: bytes of the answers.
        cpu: seconds of the processor, here; not the backend's.
    """

    certificates: list[float] = field(default_factory=list)
    builds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    warnings: set[str] = field(default_factory=set)
    requests: int = 0
    sent: int = 0
    received: int = 0
    cpu: float = 0.0

    def add(self, other: Tally) -> None:
        """Add what another process did."""
        self.certificates += other.certificates
        self.builds += other.builds
        for kind, count in other.errors.items():
            self.fail(kind, count)
        self.warnings |= other.warnings
        self.requests += other.requests
        self.sent += other.sent
        self.received += other.received
        self.cpu += other.cpu

    def fail(self, text: str, count: int = 1) -> None:
        """Count an error; the names of a build are left out of it."""
        kind = _OF_ONE_BUILD.sub("…", one_line(text, 300))
        known = kind in self.errors or len(self.errors) < _KINDS
        self.errors[kind if known else "other errors"] += count


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan, carried out as far as it went."""

    plan: Plan
    tally: Tally
    seconds: float
    interrupted: bool

    def to_json(self) -> dict[str, Any]:
        """Everything as a JSON object; times of certificates and builds in milliseconds."""
        tally, made = self.tally, len(self.tally.certificates)

        def each(total: float) -> float | None:
            return round(total / made, 2) if made else None

        return {
            "work": str(self.plan.work),
            "processes": self.plan.processes,
            "concurrency": self.plan.concurrency,
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "certificates": made,
            "certificates_per_second": round(made / self.seconds, 2) if self.seconds else 0.0,
            "certificate_ms": spread(tally.certificates),
            "builds": len(tally.builds),
            "build_ms": spread(tally.builds),
            "errors": dict(tally.errors.most_common()),
            "warnings": sorted(tally.warnings),
            "requests_per_certificate": each(tally.requests),
            "bytes_sent_per_certificate": each(tally.sent),
            "bytes_received_per_certificate": each(tally.received),
            "cpu_ms_per_certificate": each(1000 * tally.cpu),
        }


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p99 (the nearest rank) and max in milliseconds; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    rank = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * ordered[math.ceil(part * len(ordered)) - 1], 2) for name, part in rank.items()}


def measure(
    load: Callable[[], CASettings],
    plan: Plan,
    check: Callable[[], None] = lambda: None,
    on_begun: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Carry out a plan.

    Args:
        load: reads the settings; called in each process, so it has to survive pickling if there are several.
        plan: what to do.
        check: called again and again; what it raises ends the work, and what was done so far is returned.
        on_begun: told again and again how many were begun.

    Raises:
        CAError: the settings are wrong.
    """
    settings = load()  # what is wrong with them is told once, and before anything begins
    shared = _Shared(plan)
    with ExitStack() as stack:
        if plan.processes == 1:
            stack.enter_context(_quietly())
            running: list[_Here | _Child] = [_Here(settings, plan, shared)]
        else:
            running = [_Child(load, plan, shared) for _ in range(plan.processes)]
        tally, interrupted = Tally(), False
        begun = time.monotonic()

        def asked() -> None:
            try:
                check()
            except BaseException as error:  # whatever ends it; what was done is worth something
                raise _Stopped from error

        def watch() -> None:
            asked()
            on_begun(shared.taken.value)

        try:
            _await(
                lambda: shared.ready.value >= plan.processes or not all(one.alive for one in running), asked
            )
            begun = time.monotonic()
            shared.go.set()
            _await(lambda: all(one.ended for one in running), watch, math.inf)
        except (_Stopped, KeyboardInterrupt):
            interrupted = True
        finally:  # also where `on_begun` failed, which is an error like any other
            ended = time.monotonic()
            shared.stop.set()
            shared.go.set()
            for one in running:
                tally.add(one.tally())
    return Measured(plan, tally, ended - begun, interrupted)


def _await(condition: Callable[[], bool], check: Callable[[], None], limit: float = _START) -> None:
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        check()
        time.sleep(0.02)


class _Number:
    """A number of this process alone, with the members of `multiprocessing.Value`."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def get_lock(self) -> threading.Lock:
        return self._lock


class _Shared:
    """What all processes have in common."""

    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.context = context
        self.taken: Any
        self.ready: Any
        self.go: Any
        self.stop: Any
        if plan.processes == 1:  # semaphores of the system would outlive a program that ends by os._exit
            self.taken, self.ready = _Number(), _Number()
            self.go, self.stop = threading.Event(), threading.Event()
        else:
            self.taken, self.ready = context.Value("q", 0), context.Value("q", 0)
            self.go, self.stop = context.Event(), context.Event()
        self.tag = secrets.token_hex(3)
        self.count = plan.count

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "context"}

    def number(self) -> int | None:
        """Take the next number; None when all are taken."""
        with self.taken.get_lock():
            if self.taken.value >= self.count:
                return None
            self.taken.value += 1
            return int(self.taken.value)


class _Here:
    """The threads in this process."""

    alive = True

    def __init__(self, settings: CASettings, plan: Plan, shared: _Shared) -> None:
        self._tally = Tally()
        arguments = (settings, plan, shared, self._tally)
        self._thread = threading.Thread(target=_work, args=arguments, name="bench", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def tally(self) -> Tally:
        self._thread.join(_FAREWELL)
        return self._tally


class _Child:
    """Another process with its threads."""

    def __init__(self, load: Callable[[], CASettings], plan: Plan, shared: _Shared) -> None:
        self._answer: Connection
        self._answer, theirs = shared.context.Pipe(duplex=False)
        self._process: BaseProcess = shared.context.Process(
            target=_child, args=(load, plan, shared, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def ended(self) -> bool:
        return self._answer.poll() or not self.alive

    def tally(self) -> Tally:
        found: Tally | None = None
        with suppress(EOFError, OSError):
            if self._answer.poll(_FAREWELL):
                found = self._answer.recv()
        self._process.join(_FAREWELL if found else 0)
        self._process.kill()
        self._process.join()
        self._answer.close()
        if found is None:
            found = Tally()
            found.fail(f"a process of the measurement ended with status {self._process.exitcode}")
        return found


def _child(load: Callable[[], CASettings], plan: Plan, shared: _Shared, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to stop
    tally = Tally()
    with _quietly():
        _work(load(), plan, shared, tally)
    answer.send(tally)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the same warning of a thousand authorities out of the log; the tally has it once."""
    logger = logging.getLogger("firebuild_pki.authority")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Stopped(BaseException):
    """The work is to end, now."""


def _work(settings: CASettings, plan: Plan, shared: _Shared, tally: Tally) -> None:
    with shared.ready.get_lock():
        shared.ready.value += 1
    shared.go.wait()
    end = math.inf if plan.duration is None else time.monotonic() + plan.duration.total_seconds()
    before, cpu = traffic(), time.process_time()
    with ThreadPoolExecutor(plan.concurrency, "bench") as pool:
        parts = [pool.submit(_Thread(settings, plan, shared).run, end) for _ in range(plan.concurrency)]
    for part in parts:
        tally.add(part.result())
    tally.cpu = time.process_time() - cpu
    tally.requests, tally.sent, tally.received = (
        now - then for now, then in zip(traffic(), before, strict=True)
    )


class _Thread:
    """One of the threads, and the authority that it keeps open."""

    def __init__(self, settings: CASettings, plan: Plan, shared: _Shared) -> None:
        self._settings = settings
        self._work = plan.work
        self._shared = shared
        self._kept: Authority | None = None
        self._tally = Tally()

    def run(self, end: float) -> Tally:
        """Work until nothing is left, the end has come, or there is no hope."""
        failed = 0
        with suppress(_Stopped):
            while failed < HOPELESS and time.monotonic() < end and not self._shared.stop.is_set():
                number = self._shared.number()
                if number is None:
                    break
                failed = 0 if self._once(number) else failed + 1
        if failed >= HOPELESS:
            self._tally.fail(f"a thread gave up after {HOPELESS} errors in a row")
        if self._kept is not None:
            self._close(self._kept)
        return self._tally

    def _once(self, number: int) -> bool:
        try:
            if self._work is Work.BUILD:
                self._build(number)
            else:
                self._kept = self._kept or self._open(number)
                self._issue(self._kept, self._work)
        except CAError as error:
            self._tally.fail(error.message)
            return False
        return True

    def _build(self, number: int) -> None:
        began = time.perf_counter()
        authority = self._open(number)
        try:
            self._issue(authority, Work.SERVER)
            self._issue(authority, Work.GUEST)
        finally:
            self._close(authority)
        self._tally.builds.append(time.perf_counter() - began)

    def _open(self, number: int) -> Authority:
        build_id = f"bench-{self._shared.tag}-{number}"
        return open_authority(self._settings, build_id=build_id, check=self._check)

    def _issue(self, authority: Authority, end: Work) -> None:
        began = time.perf_counter()
        if end is Work.SERVER:
            authority.issue_server()
        else:
            authority.issue_guest()
        self._tally.certificates.append(time.perf_counter() - began)

    def _close(self, authority: Authority) -> None:
        authority.close()
        self._tally.warnings.update(authority.warnings)

    def _check(self) -> None:
        if self._shared.stop.is_set():
            raise _Stopped
