"""The suite's own order, guard and messages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from running import Channel, Scheduler, compiled_once, last_words, minutes, reasons
from support import REPO, unmeasured


def test_a_test_that_closes_a_descriptor_of_its_worker_fails_and_the_descriptor_is_restored() -> None:
    reading, writing = os.pipe()
    channel = Channel([reading, writing])
    channel.check()
    os.close(reading)
    with pytest.raises(pytest.fail.Exception, match=f"closed or replaced descriptor {reading}, which"):
        channel.check()
    with open(os.devnull, "rb") as other:
        os.dup2(other.fileno(), writing)
    with pytest.raises(pytest.fail.Exception, match=f"closed or replaced descriptor {writing}, which"):
        channel.check()
    os.write(writing, b"restored")
    assert os.read(reading, 100) == b"restored"
    channel.check()
    channel.close()
    os.close(reading)
    os.close(writing)


PROJECT = """
import os
import pytest

def guard():
    return next(one for one in CONFIG.pluginmanager.get_plugins() if type(one).__name__ == "Channel")

@pytest.fixture(autouse=True)
def config(request):
    global CONFIG
    CONFIG = request.config

@pytest.mark.parametrize("number", range(3))
def test_short(number):
    pass

@pytest.mark.skip(reason="needs a moon: wait for the night")
@pytest.mark.parametrize("number", range(2))
def test_skipped(number):
    pass

@pytest.mark.xdist_group("one")
def test_grouped():
    pass

@pytest.mark.long
def test_long():
    os.close(sorted(guard()._kept)[0])
"""
CONFTEST = """
import pytest
from running import Announcer, Measurer, Scheduler, Sender, begun_first, channel_of, worker_of

def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes long")
    channel = channel_of(config)
    config.pluginmanager.register(channel or Announcer(config))
    if channel is not None:
        config.pluginmanager.register(Measurer())
        if Sender.suits(config):
            config.pluginmanager.register(Sender(worker_of(config)))

def pytest_xdist_make_scheduler(config, log):
    return Scheduler(config, log)

def pytest_collection_modifyitems(items):
    begun_first(items)
"""


def run_of(project: Path, files: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the tests of a project with one worker, and with what this suite does around its tests."""
    for name, text in {
        **files,
        "conftest.py": CONFTEST,
        "pytest.ini": "[pytest]\nfilterwarnings = error\n",
    }.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", *options],
        cwd=project,
        env={**unmeasured(), "PYTHONPATH": str(REPO / "tests"), "PYTEST_ADDOPTS": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_begins_with_what_is_long_names_the_culprit_and_says_what_is_left_out(
    tmp_path: Path,
) -> None:
    done = run_of(
        tmp_path, {"test_project.py": PROJECT}, "-v", "--dist", "loadgroup", "--no-loadscope-reorder"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "7 tests: about 1 min, unless this machine is slow or busy" in done.stdout
    begun = [line for line in done.stdout.splitlines() if line.startswith("test_project.py::")]
    assert [line.split("::")[1].partition("[")[0].partition("@")[0].strip() for line in begun][:3] == [
        "test_long",
        "test_grouped",
        "test_short",
    ]
    at_once, _, _ = done.stdout.partition("test_grouped")
    assert "failed: test_project.py::test_long: Failed: this test closed or replaced descriptor" in at_once
    assert "ERROR test_project.py::test_long - Failed: this test closed or replaced descriptor" in done.stdout
    assert "5 passed, 2 skipped, 1 error" in done.stdout
    _, _, last = done.stdout.partition("1 failed, and their last words")
    assert "test_project.py::test_long\n" in last
    assert "Failed: this test closed or replaced descriptor" in last
    assert "     2 needs a moon: wait for the night\n" in done.stdout


OUTCOMES = """
import os
import pytest

@pytest.fixture
def made(request):
    assert "make" not in request.node.name
    yield
    assert "remove" not in request.node.name

@pytest.mark.parametrize("name", ["good", "make", "remove", "wrong", "skip", "crash"])
@pytest.mark.xdist_group("together")
def test_one(name, made):
    assert name != "wrong"
    if name == "crash":
        os._exit(9)
    if name == "skip":
        pytest.skip("is not asked for")
"""


def test_a_worker_that_sends_less_hides_no_outcome(tmp_path: Path) -> None:
    options = ["-rA", "--dist", "loadgroup", "--no-loadscope-reorder", "--max-worker-restart", "0"]
    done, whole = (
        run_of(tmp_path, {"test_project.py": OUTCOMES}, *options, *more)
        for more in ([], ["--durations=9", "--durations-min=0"])
    )
    for line in (
        "ERROR test_project.py::test_one[make]@together - AssertionError",
        "ERROR test_project.py::test_one[remove]@together - AssertionError",
        "FAILED test_project.py::test_one[wrong]@together - AssertionError",
        "FAILED test_project.py::test_one[crash]@together",
        "PASSED test_project.py::test_one[good]@together",
        "is not asked for",
    ):
        assert line in done.stdout
    counted = "2 failed, 2 passed, 1 skipped, 2 errors in"
    assert counted in done.stdout
    assert counted in whole.stdout
    assert "s teardown" in whole.stdout


def test_the_scheduler_forgets_a_group_that_is_done() -> None:
    given: list[int] = []
    node: Any = Mock(shutting_down=False, send_runtest_some=given.extend)
    options = SimpleNamespace(loadscopereorder=False)
    config: Any = SimpleNamespace(option=options, getvalue=lambda _: ["popen"])
    scheduler = Scheduler(config, log=Mock())
    scheduler.add_node(node)
    scheduler.add_node_collection(node, ["a@g", "b@g", *map(str, range(13))])
    scheduler.schedule()
    while given[0] < 8:
        scheduler.mark_test_complete(node, given.pop(0))
    assert scheduler.assigned_work[node] == {str(number - 2): {str(number - 2): False} for number in given}


def test_of_two_that_compile_the_same_file_one_waits(tmp_path: Path) -> None:
    file = tmp_path / "test_file.py"
    file.touch()
    entered: list[int] = []

    def enter() -> None:
        with compiled_once(file):
            entered.append(2)

    with ThreadPoolExecutor() as pool:
        with compiled_once(file):
            waiting = pool.submit(enter)
            time.sleep(0.1)
            entered.append(1)
        waiting.result()
    assert entered == [1, 2]


MEASURED = {
    ".coveragerc": """
[run]
branch = true
parallel = true
patch = subprocess
source_pkgs = product
[report]
show_missing = true
""",
    "product/__init__.py": "",
    "product/never.py": "imported = True",
    "product/work.py": """
import sys

def work(kind):
    if kind == "one":
        return 1
    if kind == "two":
        return 2
    return 3

if __name__ == "__main__":
    work(sys.argv[1])
""",
    "unit/test_unit.py": """
import subprocess, sys
from product.work import work

def test_work():
    work("one")
    subprocess.run([sys.executable, "-m", "product.work", "other"], check=True)
""",
    "cli/test_cli.py": """
import subprocess, sys
from product.work import work

def test_work():
    work("one")
    subprocess.run([sys.executable, "-m", "product.work", "two"], check=True)
""",
    "oracle/test_oracle.py": """
import subprocess, sys
from product.work import work

def test_work():
    work("two")
    subprocess.run([sys.executable, "-m", "product.work", "two"], check=True)
""",
}


@pytest.mark.parametrize(
    ("order", "lines"),
    [
        (("unit", "oracle"), "8"),
        (("oracle", "unit"), "8"),
        (("oracle",), "5-9,12"),
        (("cli",), "7-9,12"),
        (("cli", "unit"), "8"),
        (("oracle", "cli", "unit", "cli"), "8"),
    ],
)
def test_only_tests_of_other_folders_and_what_is_imported_are_measured(
    tmp_path: Path, order: Sequence[str], lines: str
) -> None:
    done = run_of(tmp_path, MEASURED, "--cov", "--cov-report=term", "--import-mode=importlib", *order)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("product/")]
    missing = {row[0]: "".join(row[6:]) for row in rows}
    assert missing["product/never.py"] == ""
    assert missing["product/work.py"] == lines


CASES = """
import sys
import pytest
from product.work import work

@pytest.mark.parametrize("number", range(30))
def test_cases(number):
    work({0: "other", 10: "two"}.get(number, "one"))
    assert bool(sys.gettrace()) == (number in [0, 1, 2, 3, 4, 10, 11, 12, 13, 19, 27])

def test_another():
    assert sys.gettrace()
"""


def test_cases_that_run_nothing_new_are_measured_seldom(tmp_path: Path) -> None:
    files = {**MEASURED, "unit/test_unit.py": CASES}
    done = run_of(tmp_path, files, "--cov", "--cov-report=term", "--import-mode=importlib", "unit")
    assert done.returncode == 0, done.stdout + done.stderr


def test_reasons_are_counted_and_those_of_most_tests_come_first() -> None:
    reports = [SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}")) for reason in ("a", "b", "b")]
    assert reasons(reports) == ["     2 b", "     1 a"]


@pytest.mark.parametrize(
    ("tests", "each", "processors", "said"),
    [(11_000, 0.16, 2, "15 min"), (11_000, 0.16, 4, "7 min"), (10, 0.16, 2, "1 min")],
)
def test_the_minutes_are_those_of_all_processors(tests: int, each: float, processors: int, said: str) -> None:
    assert minutes(tests, each, processors) == said


def test_of_a_failure_the_last_words_are_shown() -> None:
    text = "\n".join(
        ["first", *(f"line {number}" for number in range(13)), "_ _ _", "", "OSError: told last   "]
    )
    shown = last_words(text).splitlines()
    assert shown[-1] == "    OSError: told last"
    assert shown[0] == "    line 2"
    assert last_words("x" * 1000) == "    " + "x" * 300
