"""The long tests: each tries something again and again until its time is over, and counts what it tried.

A trial is a function of an `Effort`. It makes its own servers, stores and processes below the effort's
directory, and leaves none of them behind. A fault is: something lost, a wrong success, a hang, a leak, and
any exception other than those that say in words what is wrong.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MODULES: Final = (
    "authorities",
    "clocks",
    "differences",
    "disks",
    "escapes",
    "fuzzed",
    "hostile_archives",
    "hostile_guest",
    "hostile_registry",
    "hostile_server",
    "hygiene",
    "killed",
    "slow",
    "strangers",
    "together",
)
"""The modules of this directory that have trials."""


@dataclass
class Effort:
    """What a trial gets, and what it gives back.

    Args:
        directory: empty, for this trial alone.
        seconds: for how long something new is begun.
        seed: of all that is left to chance.
    """

    directory: Path
    seconds: float
    seed: int = 1
    counts: Counter[str] = field(default_factory=Counter)
    """How often each kind of thing was tried."""
    faults: list[str] = field(default_factory=list)
    """What was found."""

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self._end = time.monotonic() + self.seconds
        self._lock = threading.Lock()

    def goes_on(self) -> bool:
        """Whether there is time to begin something new; always true before the first."""
        return not self.counts or time.monotonic() < self._end

    def shuffled(self, names: Iterable[str]) -> Iterator[str]:
        """Yield names in an order by chance, while there is time."""
        every = list(names)
        for name in self.chance.sample(every, len(every)):
            if self.goes_on():
                yield name

    def attempt(self, kind: str, what: Callable[[], object]) -> None:
        """Try something once, and count it; an exception is a fault, and the trial goes on. Threads may call.

        Args:
            kind: what it is, in a few words; the number of kinds is small.
            what: raises where something is wrong.
        """
        with self._lock:
            self.counts[kind] += 1
        try:
            what()
        except Exception:
            number = sum(self.counts.values())
            self.faults.append(f"{kind}, number {number} of seed {self.seed}:\n{traceback.format_exc()}")


@dataclass(frozen=True)
class Trial:
    """One of them."""

    name: str
    what: str
    run: Callable[[Effort], None]
    seconds: float
    """How long it goes on, unless it is told."""
    needs: tuple[str, ...]
    """Components of the machine (components.py)."""
    in_suite: bool
    """Whether a short form runs with the tests."""


TRIALS: Final[dict[str, Trial]] = {}


def trial(
    name: str, what: str, *, seconds: float = 300, needs: tuple[str, ...] = (), in_suite: bool = True
) -> Callable[[Callable[[Effort], None]], Callable[[Effort], None]]:
    """Make a function a trial.

    Args:
        name: a word or two with hyphens.
        what: it tries, for the table: a noun phrase.
        seconds: how long it goes on, unless it is told.
        needs: components of the machine (components.py).
        in_suite: whether a short form runs with the tests.
    """

    def register(run: Callable[[Effort], None]) -> Callable[[Effort], None]:
        TRIALS[name] = Trial(name, what, run, seconds, needs, in_suite)
        return run

    return register


def load() -> dict[str, Trial]:
    """Return all trials by their names."""
    here = str(Path(__file__).resolve().parents[1])
    if here not in sys.path:
        sys.path.insert(0, here)
    for module in MODULES:
        importlib.import_module(f"assurance.{module}")
    return TRIALS


def damaged(chance: random.Random, message: bytes) -> bytes:
    """Change some bytes of it, cut it, or double it."""
    changed = bytearray(message or b"\x0a")
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(chance.choice((changed, changed[: len(changed) // 2], changed * 2)))
