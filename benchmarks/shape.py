"""The one shape of all benchmarks: rows that are declared with their goals, and a function that measures
them.

A module has a `BENCHMARK`. Its function gets a `Run` and adds to it, for each row, pairs of values: ours,
and what the peer or the limit took in the same turn. Less is better in every row.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

FIREBUILD: Final = str(Path(sys.executable).with_name("firebuild"))
QUARTILES_FROM: Final = 8
"""So many pairs make quartiles of a spread; of fewer it is the lowest and the highest ratio."""


@dataclass(frozen=True)
class Row:
    """A comparison.

    Args:
        what: is done, in a few words.
        against: the peer that does the same, or the limit.
        unit: of both values.
        goal: the highest ratio of ours to theirs that is to be reached; None where nothing is aimed at.
        needs: what the peer takes of the machine: names of tests/components.py, or `BuildKit`.
    """

    what: str
    against: str
    unit: str = "s"
    goal: float | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a row came to.

    Args:
        row: the comparison.
        pairs: ours and theirs, of each turn.
        why: there are no pairs.
    """

    row: Row
    pairs: Sequence[tuple[float, float]]
    why: str = ""

    @property
    def medians(self) -> tuple[float, float]:
        """Ours and theirs."""
        ours, theirs = (statistics.median(values) for values in zip(*self.pairs, strict=True))
        return ours, theirs

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(self._ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the ratios, or the lowest and the highest of a few."""
        ratios = self._ratios
        if len(ratios) < QUARTILES_FROM:
            return min(ratios), max(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        return low, high

    @property
    def _ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in self.pairs]

    @property
    def state(self) -> str:
        """What became of the goal: a word for the table; empty where there is none."""
        if self.why:
            return "not measured"
        if self.row.goal is None:
            return ""
        return "reached" if self.ratio <= self.row.goal else "missed"


@dataclass
class Run:
    """What the function of a benchmark gets, and what it gives back.

    Args:
        directory: empty, for this benchmark alone.
        rounds: how often all take their turns.
        absent: rows that cannot be measured here, and why.
    """

    directory: Path
    rounds: int
    absent: Mapping[Row, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: dict[Row, list[tuple[float, float]]] = field(default_factory=dict)

    def wants(self, rows: Collection[Row]) -> bool:
        """Tell whether any of the rows can be measured."""
        return any(row not in self.absent for row in rows)

    def add(self, row: Row, ours: float, theirs: float) -> None:
        """Add a pair to a row."""
        self.pairs.setdefault(row, []).append((ours, theirs))

    def note(self, text: str) -> None:
        """Keep what else was found: a part of a sentence."""
        self.notes.append(text)

    def turns(
        self,
        row: Row,
        ours: Callable[[], object],
        theirs: Callable[[], object],
        *,
        each: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Let two actions take turns, and each be the first as often as the other.

        Args:
            row: gets a pair of times for each turn.
            ours: the one.
            theirs: the other.
            each: how many turns a round has.
            clock: returns seconds.
        """
        scale = {"s": 1.0, "ms": 1e3}[row.unit.split()[0]]
        for turn in range(each * self.rounds):
            if turn % 2:
                other = timed(theirs, clock)
                own = timed(ours, clock)
            else:
                own = timed(ours, clock)
                other = timed(theirs, clock)
            self.add(row, own * scale, other * scale)


@dataclass(frozen=True)
class Benchmark:
    """One of them.

    Args:
        name: that of its module, with hyphens.
        prose: in Markdown: what is measured, and what limits it.
        rows: what it compares, with the goals.
        measure: adds the pairs.
        rounds: how often all take their turns, unless it is told.
        needs: what all rows take of the machine, as `Row.needs`.
    """

    name: str
    prose: str
    rows: tuple[Row, ...]
    measure: Callable[[Run], None]
    rounds: int
    needs: tuple[str, ...] = ()


def timed(action: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that an action takes."""
    began = clock()
    action()
    return clock() - began


def command(words: Sequence[str | Path], environ: Mapping[str, str] | None = None) -> str:
    """Run a command and return what it prints.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        errors="replace",
        env=environ,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{Path(words[0]).name} ended with {done.returncode}: {done.stderr[-2000:].strip()}"
        )
    return done.stdout


def firebuild_environ(home: Path) -> dict[str, str]:
    """Return the environment of a firebuild with a store of its own, and no settings of the user's."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("FIREBUILD_")}
    return {**ours, "FIREBUILD_HOME": str(home), "FIREBUILD_PULL": "never"}
