"""How benchmarks are run and told, with small ones of the test's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import components
from support import REPO


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The package, which is beside the tests and not among them."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(REPO))
    yield SimpleNamespace(
        runner=importlib.import_module("benchmarks.runner"), shape=importlib.import_module("benchmarks.shape")
    )
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "benchmarks":
            del sys.modules[name]


Made = Callable[..., Any]


@pytest.fixture
def make(bench: SimpleNamespace) -> Made:
    """Make a benchmark whose one row has these pairs."""

    def one(name: str, *pairs: tuple[float, float], goal: float | None = 1.0, needs: str = "") -> Any:
        row = bench.shape.Row(f"what {name} does", "peer", goal=goal, needs=(needs,) if needs else ())

        def measure(run: Any) -> None:
            if not pairs:
                raise RuntimeError("it | broke")
            for ours, theirs in pairs:
                run.add(row, ours, theirs)

        return bench.shape.Benchmark(name, f"Prose of {name}.", (row,), measure, rounds=1)

    return one


def test_a_goal_that_is_missed_and_a_row_that_is_not_measured_fail(
    bench: SimpleNamespace,
    make: Made,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(components._COMPONENTS, "moon", (lambda: False, "wait for the night"))
    good = make("good", (1.0, 2.0), (1.0, 4.0), (3.0, 4.0))
    slow = make("slow", (5.0, 2.0), goal=1.5)
    aimless = make("aimless", (5.0, 2.0), goal=None)
    broken, absent = make("broken"), make("absent", (1.0, 1.0), needs="moon")
    page = tmp_path / "RESULTS.md"
    assert bench.runner.bench([good, aimless], [good, aimless], page) == 0
    assert "All goals are reached." in capsys.readouterr().out
    everything = [good, slow, aimless, broken, absent]
    assert bench.runner.bench(everything, everything, page) == 1
    out = capsys.readouterr().out
    assert "missed: slow: what slow does, against peer: 2.50 (2.50 to 2.50), goal 1.5" in out
    assert "not measured: broken: what broken does, against peer: failed: RuntimeError: it" in out
    assert "not measured: absent: what absent does, against peer: not here: needs moon: wait" in out
    text = page.read_text()
    assert "| good | what good does | 1 | peer | 4 | s | 0.50 | 0.25 to 0.75 | 1 | reached |" in text
    assert "| slow | what slow does | 5 | peer | 2 | s | 2.50 | 2.50 to 2.50 | 1.5 | missed |" in text
    assert "| aimless | what aimless does | 5 | peer | 2 | s | 2.50 | 2.50 to 2.50 |  |  |" in text
    assert "failed: RuntimeError: it / broke" in text


def test_what_was_not_in_a_run_keeps_its_result(bench: SimpleNamespace, make: Made, tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    first, second = make("first", (1.0, 1.0)), make("second", (1.0, 1.0))
    bench.runner.bench([first, second], [first, second], page)
    kept = [line for line in page.read_text().splitlines() if "what first does" in line]
    again = make("second", (0.5, 1.0))
    bench.runner.bench([again], [first, again], page)
    text = page.read_text()
    assert kept[0] in text
    assert "| second | what second does | 0.50 | peer | 1 | s | 0.50 |" in text
    assert "Prose of first." in text
    assert text.count("## second") == 1


def test_all_benchmarks_have_a_name_of_their_own_and_rows(bench: SimpleNamespace) -> None:
    found = bench.runner.load()
    assert len({one.name for one in found}) == len(found)
    assert all(one.rows and one.prose.strip() for one in found)
