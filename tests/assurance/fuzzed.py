"""The fuzzer's targets, with coverage, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from assurance.trials import Effort, trial
from fuzz.targets import TARGETS

FUZZ = Path(__file__).parents[1] / "fuzz/run"
EACH = 300
"""Seconds of a target, unless it is told."""


@trial(
    "fuzzing",
    f"{len(TARGETS)} readers of untrusted bytes, with inputs that reach new code",
    seconds=EACH * len(TARGETS),
    needs=("atheris",),
    in_suite=False,  # tests/fuzz/test_fuzz.py is the short form
)
def fuzzing(effort: Effort) -> None:
    """Run the fuzzer, and count its executions."""
    found = effort.directory / "results"
    seconds = max(1, round(effort.seconds / len(TARGETS)))
    command = [sys.executable, str(FUZZ), "--seconds", str(seconds), "--json", str(found), "--record"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    for line in found.read_text().splitlines():
        result = json.loads(line)
        effort.counts[result["target"]] += result["executions"]
    if done.returncode:
        effort.faults.append(done.stdout)
