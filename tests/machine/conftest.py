from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firebuild_bootstrap.image.trees import Trees
from firebuild_bootstrap.machine.local import LocalMachine
from firebuild_bootstrap.machine.workspace import Workspace
from firebuild_bootstrap.sandbox import IdMap, Sandbox, detect
from support import await_end_of_processes

AsTester = Callable[[str], str]


@pytest.fixture
def machine(tmp_path: Path, idmap: IdMap) -> Iterator[LocalMachine]:
    made = LocalMachine(Workspace(tmp_path, "build-1", idmap))
    yield made
    made.close()


@pytest.fixture
def as_tester(tmp_path: Path, public_packages: str) -> Iterator[AsTester]:
    """Run a Python script as the unprivileged user `tester`, in a home of its own in `$HOME`."""
    user = pwd.getpwnam("tester")
    home = Path("/tmp") / f"tester-{os.getpid()}-{tmp_path.name}"
    home.mkdir()
    os.chown(home, user.pw_uid, user.pw_gid)
    python = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": public_packages}
    env["PYTHONFAULTHANDLER"] = "1"  # an end by SIGSEGV says where

    def run(script: str) -> str:
        command = [python, "-sSP", "-c", script]
        done = subprocess.run(
            command,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            env=env,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in (0, -9), f"status {done.returncode}: {done.stderr}"
        return done.stdout

    yield run
    await_end_of_processes(home)
    Trees(Sandbox(detect())).remove(home)
