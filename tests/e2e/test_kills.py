"""What kill -9 leaves: all steps that were finished are in the cache, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support import Firebuild

pytestmark = pytest.mark.needs("bwrap")


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def family(pid: int) -> set[int]:
    """A process and all below it."""
    found = {pid}
    for name in sorted(filter(str.isdecimal, os.listdir("/proc")), key=int):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent in found:
            found.add(int(name))
    return found


@pytest.mark.parametrize("all_of_it", [False, True], ids=["firebuild", "everything"])
def test_what_was_finished_before_a_kill_is_cached(
    firebuild: Firebuild, context: Path, *, all_of_it: bool
) -> None:
    names = [f"{time.time_ns()} {place}" for place in range(5)]
    (context / "taken").write_text(names[0])

    def build(fourth: str) -> subprocess.Popen[bytes]:
        text = f"FROM host\nCOPY taken /\nRUN echo {names[1]} > /one\nRUN {fourth}\nRUN echo {names[4]}\n"
        (context / "Dockerfile").write_text(text)
        options: list[str | Path] = [
            "--dockerfile",
            context / "Dockerfile",
            "--tag",
            "t/killed:1",
            "--output",
            "tar",
        ]
        return firebuild.popen("rootfs", "--context", context, *options, "--progress", "rawjson")

    killed = build("sleep 1000")
    assert killed.stdout is not None
    for line in killed.stdout:
        if {"event": "step-started", "step": 4}.items() <= json.loads(line).items():
            break
    for pid in sorted(family(killed.pid)) if all_of_it else [killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()
    if all_of_it:
        assert firebuild.leftovers(), "the cleanup process was killed, too"
    else:
        assert eventually(lambda: not firebuild.leftovers())
    again = build(f"echo {names[3]}")
    output, _ = again.communicate()
    events = [json.loads(line) for line in output.splitlines()]
    assert again.returncode == 0, events
    assert [event["step"] for event in events if event["event"] == "step-cached"] == [2, 3]
    assert [event["step"] for event in events if event["event"] == "step-finished"] == [1, 4, 5]
    assert eventually(lambda: not firebuild.leftovers())
