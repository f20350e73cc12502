"""buildah and firebuild build on each other's images, which travel as files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("bwrap", "busybox", "buildah")
FIREBUILD = Path(sys.executable).parent / "firebuild"


@pytest.mark.needs("ids")
@pytest.mark.parametrize("form", ["docker", "oci"])
def test_each_builds_on_what_the_other_has_built(tmp_path: Path, form: str) -> None:
    environ = {
        **os.environ,
        "FIREBUILD_HOME": str(tmp_path / "home"),
        "STORAGE_DRIVER": "vfs",
        "BUILDAH_ISOLATION": "chroot",
    }

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, timeout=100, env=environ, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    buildah = ("buildah", "--root", tmp_path / "storage", "--runroot", tmp_path / "run")
    # No network, and limits that no privilege is needed for: nothing here is about what it gives a RUN.
    modest = ("--network=none", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024")
    (tmp_path / "bin").mkdir()
    for name in ("sh", "rm"):
        shutil.copy("/bin/busybox", tmp_path / "bin" / name)
    (tmp_path / "one").write_text("FROM scratch\nCOPY bin /bin\nRUN echo 1 > /one && echo 2 > /two\n")
    (tmp_path / "two").write_text("FROM acme/web:1\nRUN rm /one && echo 3 > /three\n")
    (tmp_path / "three").write_text("FROM app:1\nRUN rm /two && echo 4 > /four\n")
    archive = f"{form}-archive:{tmp_path}"
    run(*buildah, "bud", *modest, "-f", "one", "-t", "acme/web:1", ".")
    run(*buildah, "push", "acme/web:1", f"{archive}/first.tar:acme/web:1")
    run(FIREBUILD, "images", "load", "first.tar", "--name", "acme/web:1")
    run(FIREBUILD, "build", "-f", "two", "-t", "app:1", f"--output=type={form},dest=second.tar", ".")
    run(*buildah, "pull", f"{archive}/second.tar")
    run(*buildah, "bud", *modest, "--pull-never", "-f", "three", "-t", "last:1", ".")
    container = run(*buildah, "from", *modest, "--pull-never", "last:1").strip()
    # By its status: what a program writes there does not always reach us, as its chroot ends with it.
    look = "test ! -e /one && test ! -e /two && test -e /three && test -e /four"
    run(*buildah, "run", "--isolation", "chroot", container, "--", "/bin/sh", "-c", look)
