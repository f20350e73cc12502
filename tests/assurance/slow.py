"""The tests that `make test` leaves out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from assurance.trials import Effort, trial

REPO = Path(__file__).parents[2]


@trial(
    "slow-tests",
    "tests of whole systems, of which a quicker one is in `make test`",
    in_suite=False,
)
def slow(effort: Effort) -> None:
    """Run the tests that are marked `release`, once, and count those of each folder."""
    report = effort.directory / "report.xml"
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadgroup", "-m", "release"]
    done = subprocess.run(
        [*command, "--junitxml", str(report)], cwd=REPO, capture_output=True, text=True, check=False
    )
    for case in ElementTree.parse(report).iter("testcase"):
        what = "skipped" if case.find("skipped") is not None else "test"
        effort.counts[f"{what} of {'.'.join(case.get('classname', '').split('.')[:2])}"] += 1
    if done.returncode:
        effort.faults.append(done.stdout)
