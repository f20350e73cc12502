"""A plugin that was released before goes on working: the contract is stable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.needs("cfssl")
def test_the_last_released_wheel_of_a_plugin_passes_the_kit_of_today(tmp_path: Path) -> None:
    (wheel,) = (HERE / "released").glob("firebuild_pki_cfssl-*.whl")
    with zipfile.ZipFile(wheel) as content:  # pure Python: installing it is unpacking it
        content.extractall(tmp_path)
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, HERE))),
        "RELEASED": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    suite = shutil.copy(HERE / "released_suite.py", tmp_path / "test_suite.py")  # away from our conftest.py
    done = subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(tmp_path), suite],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
