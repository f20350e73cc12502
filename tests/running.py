"""What the suite does around its tests: their order, what it says of its time and of what it left out."""

from __future__ import annotations

import fcntl
import os
import pkgutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import pytest
from coverage import Coverage
from xdist.remote import WorkerInteractor
from xdist.scheduler import LoadGroupScheduling
from xdist.workermanage import WorkerController

# Seconds of one processor for a test on average: 21 minutes of two processors for 11,600 tests.
SECONDS_EACH = 0.22
_PACE = "firebuild/seconds-each"
# Folders and files whose tests meet what others meet as well, and take long: they do so at full speed.
UNMEASURED = frozenset(
    [
        "assurance",
        "baoserver",
        "e2e",
        "guest_service",
        "library",
        "machine_qemu",
        "oracle",
        "pages",
        "pki_ci",
        "pki_cluster",
        "pki_conformance",
        "test_initramfs_boot.py",
        "test_memory.py",
    ]
)
# Folders that start many short processes, each of which would take twice as long to measure itself: what they
# run is run by other tests, in the tests' own process or in theirs.
MEASURED_HERE = frozenset(["cli"])
# Cases of a test in a row that ran nothing new, after which only each eighth of its cases is measured, until
# one does: with coverage, Python takes up to three times as long.
KNOWN_AFTER = 3
SAMPLED = 8
# Failures whose last words are shown.
_MOST_SHOWN = 20
# A part of the suite says little of the whole.
_ENOUGH = 1000


def begun_first(items: list[pytest.Item]) -> None:
    """Put what is long in front: nobody waits at the end for a test that was begun last.

    A group of `xdist_group` runs on one worker, one test after the other, and counts as a whole.
    """
    long = {_unit(item) for item in items if item.get_closest_marker("long")}
    grouped = {item for item in items if item.get_closest_marker("xdist_group")}
    items.sort(key=lambda item: 0 if _unit(item) in long else 1 if item in grouped else 2)


def _unit(item: pytest.Item) -> object:
    group = item.get_closest_marker("xdist_group")
    return group.args[0] if group is not None else item.nodeid


def minutes(tests: int, seconds_each: float, processors: int) -> str:
    """Say how long so many tests take.

    Args:
        seconds_each: how long one takes a processor on average.
    """
    return f"{max(1, round(tests * seconds_each / processors / 60))} min"


def reasons(skipped: Sequence[Any]) -> list[str]:
    """Say why tests were skipped: how many for each reason, most first."""
    counted = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    return [f"{count:6} {reason}" for reason, count in counted.most_common()]


def last_words(text: str) -> str:
    """Return the last lines of what is said of a failure that have letters, indented."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip(" _-=")]
    return "\n".join(f"    {line[:300]}" for line in lines[-12:])


class Announcer:
    """Says at the beginning about how long it takes, and at the end what was skipped; not in a worker.

    What fails is told at once, too: the end may be far.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._cache = getattr(config, "cache", None)  # pytest may run without
        self._began = time.monotonic()
        self._processors = len(os.sched_getaffinity(0))
        self._tests = 0

    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        if self._tests or not ids:
            return
        self._tests = len(ids)
        pace = self._cache.get(_PACE, None) if self._cache is not None else None
        source = "at the pace of the last run here" if pace else "unless this machine is slow or busy"
        expected = minutes(self._tests, pace or SECONDS_EACH, self._processors)
        self._say(f"{self._tests} tests: about {expected}, {source}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            found = str(report.longrepr) if crash is None else crash.message
            self._say(f"failed: {report.nodeid}: {found.partition(chr(10))[0][:500]}")

    def _say(self, line: str) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._tests >= _ENOUGH and self._cache is not None:
            taken = time.monotonic() - self._began
            self._cache.set(_PACE, taken * self._processors / self._tests)
        failed = [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]
        if failed:  # what keeps only the end of a log has it, too
            terminalreporter.section(f"{len(failed)} failed, and their last words")
            for report in failed[:_MOST_SHOWN]:
                terminalreporter.write_line(f"{report.nodeid}\n{last_words(report.longreprtext)}")
        skipped = terminalreporter.stats.get("skipped", [])
        if skipped:
            terminalreporter.section(f"{len(skipped)} skipped, and what would make them run")
            for line in reasons(skipped):
                terminalreporter.write_line(line)


class Measurer:
    """Has coverage measure what tells something of it, and nothing while it would only cost time.

    That is each module of the product as it is imported, and the tests outside the folders of UNMEASURED, but
    few of the cases of a test of which KNOWN_AFTER in a row ran nothing new in this process.
    It does nothing in a run without coverage.
    """

    def __init__(self) -> None:
        self._in_vain: Counter[tuple[Path, str]] = Counter()  # cases in a row, of each test
        self._environ: dict[str, str] = {}  # by which processes that a test starts know to measure themselves
        self._paused: Coverage | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        running = Coverage.current()
        for package in [] if running is None else cast(list[str], running.get_option("run:source_pkgs")):
            import_all(package)
        self.pause()
        try:
            return (yield)
        finally:
            self.resume()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if UNMEASURED.isdisjoint(item.path.parts):
            self.resume()
            self._tell_processes(measured=MEASURED_HERE.isdisjoint(item.path.parts))
            # A test that classes of one file inherit is one test.
            test = item.path, getattr(item, "originalname", item.name)
            cases = self._in_vain[test]
            before = arcs_run()
            with untraced() if cases >= KNOWN_AFTER and cases % SAMPLED else nullcontext():
                try:
                    return (yield)
                finally:
                    self._in_vain[test] = cases + 1 if arcs_run() == before else 0
        self.pause()
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        self.resume()

    def pause(self) -> None:
        """Measure nothing, neither here nor in processes that are started now."""
        running = Coverage.current()
        if self._paused is not None or running is None:
            return
        running.get_data()  # else each process that is forked now would write it once more
        running.stop()
        self._tell_processes(measured=False)
        self._paused = running

    def resume(self) -> None:
        """Measure again."""
        self._tell_processes(measured=True)
        if self._paused is not None:
            self._paused.start()
            self._paused = None

    def _tell_processes(self, *, measured: bool) -> None:
        """Have processes that are started from now on measure themselves, or not."""
        if measured:
            os.environ.update(self._environ)
            self._environ = {}
        else:
            names = [name for name in os.environ if name.startswith("COVERAGE_")]
            self._environ |= {name: os.environ.pop(name) for name in names}


@contextmanager
def untraced() -> Iterator[None]:
    """Have this thread, and those that are started meanwhile, run at full speed.

    Unlike `Coverage.stop`, it leaves those alone that run already.
    """
    here, others = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        threading.settrace(others)
        sys.settrace(here)


def arcs_run() -> int:
    """Count the ways from line to line that this process ran since coverage last wrote them."""
    running = Coverage.current()
    collector = None if running is None else running._collector  # there is no public way without writing
    return 0 if collector is None else sum(map(len, collector.data.values()))


def import_all(package: str) -> None:
    """Import a package and each module in it but those that are programs, or generated."""
    module = import_module(package)
    for found in pkgutil.walk_packages(module.__path__, f"{package}."):
        if not found.name.endswith("__main__") and "._proto" not in found.name:
            import_module(found.name)


class Channel:
    """A worker's descriptors to the process that gives it its tests, which no test may close or replace.

    A test, or what it runs in this process, that closes a number twice may hit one of them. The worker then
    waits forever for its next test, long after the culprit has passed.

    Args:
        descriptors: which belong to the worker.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._kept = {number: (os.dup(number), _identity(number)) for number in descriptors}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield
        self.check()

    def check(self) -> None:
        """Fail when one of them is not what it was; it is restored, so that the failure can be told."""
        replaced = [number for number, (_, identity) in self._kept.items() if _identity(number) != identity]
        for number in replaced:
            os.dup2(self._kept[number][0], number, inheritable=False)
        if replaced:
            numbers = ", ".join(map(str, replaced))
            pytest.fail(f"this test closed or replaced descriptor {numbers}, which is the test worker's own")

    def close(self) -> None:
        """Close the copies."""
        while self._kept:
            os.close(self._kept.popitem()[1][0])


def _identity(number: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Scheduler(LoadGroupScheduling):  # type: ignore[misc]  # it has no types
    """As pytest-xdist schedules groups, but it forgets those that are done.

    Else it would count after each test what is left of all that a worker ever had.
    """

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        super().mark_test_complete(node, item_index, duration)
        groups = self.assigned_work[node]
        name = self._split_scope(self.registered_collections[node][item_index])
        if all(groups[name].values()):
            del groups[name]


class Sender:
    """Has a worker send of each test only what somebody looks at: its outcome, and that it has ended.

    pytest-xdist also sends that it begins, and that what it needed was made and removed. That is half of the
    messages, and a message costs both processes more than many a test.
    """

    def __init__(self, interactor: WorkerInteractor) -> None:
        self._send = interactor.sendevent
        interactor.sendevent = self.send

    @staticmethod
    def suits(config: pytest.Config) -> bool:
        """Tell whether nobody asked for the rest: for names and times of what passes."""
        option = config.option
        return option.verbose <= 0 and not option.durations and not option.xmlpath

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_to_serializable(self, report: object) -> dict[str, Any] | None:
        """Write nothing of a report that is not sent."""
        if isinstance(report, pytest.TestReport) and report.passed and report.when != "call":
            return {}
        return None

    def send(self, name: str, **kwargs: Any) -> None:
        """Send what somebody looks at."""
        if name != "logstart" and not (name == "testreport" and "outcome" not in kwargs["data"]):
            self._send(name, **kwargs)


@contextmanager
def compiled_once(path: Path) -> Iterator[None]:
    """Wait while another worker compiles the same tests, to read then what it has kept.

    Workers collect the same files in the same order; else each compiles all of them for itself.
    """
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def worker_of(config: pytest.Config) -> WorkerInteractor | None:
    """Return what gives this worker its tests; None in a process that is no worker."""
    for plugin in config.pluginmanager.get_plugins():
        if (
            type(plugin).__name__ == "WorkerInteractor"
        ):  # the class that a worker has is not the one to import
            return cast("WorkerInteractor", plugin)
    return None


def channel_of(config: pytest.Config) -> Channel | None:
    """Return the guard of this worker's descriptors; None in a process that is no worker."""
    worker = worker_of(config)
    if worker is None:
        return None
    connection = worker.channel.gateway._io
    return Channel([connection.infile.fileno(), connection.outfile.fileno()])
