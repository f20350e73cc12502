"""What kill -9 leaves of builds side by side: all finished steps are in the cache, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from support import Firebuild, eventually, family

pytestmark = pytest.mark.needs("bwrap", "busybox")


def kill(pids: set[int]) -> None:
    for pid in sorted(pids):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.parametrize("all_of_it", [False, True], ids=["firebuild", "everything"])
def test_what_was_finished_before_a_kill_is_cached(tmp_path: Path, context: Path, *, all_of_it: bool) -> None:
    firebuild = Firebuild(tmp_path / "home")
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, context / "busybox")

    def build(tag: str, third: str) -> subprocess.Popen[bytes]:
        lines = ["FROM scratch", "COPY busybox /", 'SHELL ["/busybox", "sh", "-c"]']
        lines += ["RUN echo 3 > /three", f"RUN {third}", "RUN echo 5 > /five"]
        (context / "Dockerfile").write_text("\n".join(lines))
        options: list[str | Path] = ["--dockerfile", context / "Dockerfile", "--context", context]
        return firebuild.popen("rootfs", *options, "--tag", f"t/{tag}:1", "--progress", "rawjson")

    # Two that make the same, in the middle of their third step.
    killed = [build("one", "/busybox sleep 1000"), build("two", "/busybox sleep 1000")]
    for process in killed:
        assert process.stdout is not None
        for line in process.stdout:
            if {"event": "step-started", "step": 4}.items() <= json.loads(line).items():
                break
    pids = {process.pid for process in killed}
    kill(family(pids) if all_of_it else pids)
    for process in killed:
        process.communicate()
    if all_of_it:
        assert firebuild.leftovers(), "the cleanup processes were killed, too"
    else:
        assert eventually(lambda: not firebuild.leftovers())
    again = build("one", "echo 4 > /four")
    output, _ = again.communicate()
    events = [json.loads(line) for line in output.splitlines()]
    assert again.returncode == 0, events
    assert [event["step"] for event in events if event["event"] == "step-cached"] == [2, 3]
    assert [event["step"] for event in events if event["event"] == "step-finished"] == [1, 4, 5]
    assert eventually(lambda: not firebuild.leftovers())
