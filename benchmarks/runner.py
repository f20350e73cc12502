"""Run benchmarks, all or those that are named, print one table, and write it into benchmarks/RESULTS.md.

    make bench [ONLY="NAME …"] [ROUNDS=n] [QUICK=1]

The status is 1 where a goal is missed, or a row could not be measured. What was not in this run keeps its
last result in the file, with its date.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks import peers
from benchmarks.shape import QUARTILES_FROM, Benchmark, Found, Run
from support import this_machine

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "RESULTS.md"
MODULES: Final = (
    "authority",
    "vault",
    "builds",
    "way_of_a_file",
    "session_stream",
    "file_systems",
    "exports",
    "pull",
    "shared_cache",
)
HEAD: Final = (
    "| benchmark | what | ours | against | theirs | unit | ratio | spread | goal | | date |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|\n"
)
_EXPLAINED: Final = f"""\
Less is better in every row. Both sides of a ratio take turns; it is the median of the ratios of all turns,
and its spread their quartiles, or the lowest and the highest of fewer than {QUARTILES_FROM}. A goal is the
highest ratio that is to be reached. A limit is what the work cannot do without, or a value that was set. A
row that was not in the last run keeps its result, with its date.
"""


def load() -> list[Benchmark]:
    """Return all benchmarks, in the order of the table."""
    found: list[Benchmark] = [importlib.import_module(f"benchmarks.{name}").BENCHMARK for name in MODULES]
    return found


@dataclass(frozen=True)
class Outcome:
    """What a benchmark came to.

    Args:
        benchmark: that was run.
        found: its rows.
        told: when, at which load, and what else was found: a paragraph.
    """

    benchmark: Benchmark
    found: Sequence[Found]
    told: str


# --- measuring -----------------------------------------------------------------------------------


def measured(benchmark: Benchmark, rounds: int | None) -> Outcome:
    """Run a benchmark; rows without values say why."""
    lacks = {row: peers.absent([*benchmark.needs, *row.needs]) for row in benchmark.rows}
    absent = {row: f"not here: {why}" for row, why in lacks.items() if why}
    before, failed = os.getloadavg()[0], ""
    # What a build leaves to its cleanup process may still be there.
    with tempfile.TemporaryDirectory(
        prefix="firebuild-bench-", dir="/var/tmp", ignore_cleanup_errors=True
    ) as directory:
        run = Run(Path(directory), rounds or benchmark.rounds, absent)
        if run.wants(benchmark.rows):
            try:
                benchmark.measure(run)
            except Exception as error:
                traceback.print_exc()
                failed = f"failed: {type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    found = []
    for row in benchmark.rows:
        pairs = run.pairs.get(row, [])
        why = absent.get(row) or failed or ("" if pairs else "failed: it was left out")
        found.append(Found(row, () if why else pairs, why))
    told = f"Measured {today()}, load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    return Outcome(benchmark, found, "; ".join([told, *run.notes]) + ".")


def today() -> str:
    """Return the date of UTC."""
    return datetime.now(UTC).date().isoformat()


# --- the table -----------------------------------------------------------------------------------


def line(name: str, found: Found) -> str:
    """Return the line of the table for a row."""
    row = found.row
    goal = "" if row.goal is None else f"{row.goal:g}"
    if found.why:
        values = ["", row.against, "", row.unit, found.why.replace("|", "/"), ""]
    else:
        ours, theirs = found.medians
        spread = " to ".join(f"{ratio:.2f}" for ratio in found.spread)
        values = [number(ours), row.against, number(theirs), row.unit, f"{found.ratio:.2f}", spread]
    return f"| {' | '.join([name, row.what, *values, goal, found.state, today()])} |\n"


def number(value: float) -> str:
    """Write a value with as many digits as count."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def lines(outcome: Outcome) -> str:
    """Return the lines of a benchmark."""
    return "".join(line(outcome.benchmark.name, found) for found in outcome.found)


# --- the file ------------------------------------------------------------------------------------


def write(page: Path, head: str, everything: Iterable[Benchmark], outcomes: Sequence[Outcome]) -> None:
    """Write the results anew; what is not among the outcomes keeps what the page has of it."""
    old = page.read_text() if page.exists() else ""
    new = {outcome.benchmark.name: outcome for outcome in outcomes}
    table, sections = "", ""
    for benchmark in everything:
        name = benchmark.name
        if outcome := new.get(name):
            rows, told = lines(outcome), outcome.told
        else:
            rows = "".join(re.findall(rf"^\| {re.escape(name)} \|.*\n", old, re.MULTILINE))
            section = old.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
            [told] = re.findall(r"^Measured .*", section, re.MULTILINE) or ["Not measured yet."]
        table += rows
        sections += f"\n## {name}\n\n{benchmark.prose.strip()}\n\n{told}\n"
    page.write_text(f"# Results\n\n{head}\n{_EXPLAINED}\n{HEAD}{table}{sections}")


def bench(
    chosen: Sequence[Benchmark], everything: Sequence[Benchmark], page: Path, rounds: int | None = None
) -> int:
    """Run what is chosen, print the table, write the page, and name what is missed; return the status."""
    began, before, outcomes = time.monotonic(), os.getloadavg()[0], list[Outcome]()
    print(HEAD, end="", flush=True)
    for benchmark in chosen:
        outcomes.append(measured(benchmark, rounds))
        print(lines(outcomes[-1]), end="", flush=True)
        last = f"The last run: {', '.join(each.benchmark.name for each in outcomes)}, on {today()}"
        last += f", in {(time.monotonic() - began) / 60:.0f} min; "
        last += f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after."
        head = f"    make bench\n\n{last}\n\n{this_machine()}. Peers: {', '.join(peers.versions())}.\n"
        write(page, head, everything, outcomes)
    return verdict(outcomes)


def verdict(outcomes: Iterable[Outcome]) -> int:
    """Print which goals were missed, and what was not measured; return the status."""
    every = [(outcome.benchmark.name, found) for outcome in outcomes for found in outcome.found]
    status = 0
    for name, found in every:
        what = f"{name}: {found.row.what}, against {found.row.against}"
        if found.state == "missed":
            low, high = found.spread
            print(f"missed: {what}: {found.ratio:.2f} ({low:.2f} to {high:.2f}), goal {found.row.goal:g}")
        elif found.why:
            print(f"not measured: {what}: {found.why}")
        else:
            continue
        status = 1
    if not status:
        print("All goals are reached.")
    return status


def main() -> int:
    """Run what is asked for."""
    everything = {benchmark.name: benchmark for benchmark in load()}
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, help="of each, in place of its own number")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(everything))
    options = parser.parse_args()
    if unknown := set(options.names) - set(everything):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    os.chdir(HERE.parent)  # where `python -m benchmarks.NAME` works
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # As whoever installs firebuild has it; here nobody may have written it since the last change.
    compileall.compile_dir(HERE.parent / "src", quiet=1)
    chosen = [everything[name] for name in options.names or everything]
    return bench(chosen, list(everything.values()), RESULTS, options.rounds)
