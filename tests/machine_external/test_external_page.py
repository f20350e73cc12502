"""The page on external machines: its script builds an image in a real machine, its tables are true."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from firebuild_bootstrap.machine.external.settings import ExternalSettings
from initramfs.conftest import Kernel, alone, kernel, store
from support import BIN, REPO, Firebuild

PAGE = REPO / "docs/external.md"
__all__ = ["kernel", "store"]  # fixtures


def page_script() -> str:
    [script] = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(script)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network with a host address for the machine, and with nothing else in reach."""
    name = f"fbext-{os.getpid()}-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "-n", name, "address", "add", "172.16.0.1/30", "dev", "lo"], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / "firecracker"
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH={REPO}/tests:{REPO}/src "
        f'exec {sys.executable} -m machine_external.fc_qemu "$@"\n'
    )
    program.chmod(0o755)
    return folder


@pytest.mark.release
@pytest.mark.root
@pytest.mark.needs("userns")
@pytest.mark.needs("curl")
@pytest.mark.needs("ip")
def test_the_script_builds_an_image_in_a_machine_of_its_own(
    firebuild: Firebuild, kernel: Kernel, store: Path, namespace: str, programs: Path, tmp_path: Path
) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "hello").write_text("hello from the context\n")
    (context / "Dockerfile").write_text(
        "FROM host\nCOPY hello /srv/hello\nRUN uname -r > /kernel; id -u > /user\n"
    )
    (context / "build.sh").write_text(page_script())
    (tmp_path / "tmp").mkdir()
    environ = {
        **firebuild.environ,
        "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
        "FC_EMULATOR_TAPS": "tap0",
        "KERNEL": str(kernel.image),
        "MODULES": str(kernel.modules),
        "TAG": "t/page:1",
        "TMPDIR": str(tmp_path / "tmp"),
        "FIREBUILD_BOOTSTRAP__INITIAL_TIMEOUT": "120s",
    }
    with alone(store):  # one machine at a time
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, "sh", "build.sh"],
            cwd=context,
            env=environ,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Built t/page:1" in done.stdout
    assert "PRIVATE KEY" not in done.stdout + done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []

    shown = firebuild("images", "inspect", "t/page:1").stdout
    found = re.search(r'"path": "([^"]+\.ext4)"', shown)
    assert found is not None, shown
    assert cat(found[1], "/srv/hello") == "hello from the context\n"
    assert cat(found[1], "/kernel").strip() == kernel.modules.name
    assert cat(found[1], "/user") == "0\n"


def cat(image: str, path: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", f"cat {path}", image], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.needs("userns")
@pytest.mark.timeout(300)
def test_a_build_that_fails_ends_the_script_with_its_status(
    firebuild: Firebuild, programs: Path, tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text("FROM host\nNONSENSE\n")
    (tmp_path / "build.sh").write_text(page_script())
    (tmp_path / "tmp").mkdir()
    environ = {
        **firebuild.environ,
        "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
        "KERNEL": "none",
        "TAG": "t/page:1",
        "TMPDIR": str(tmp_path / "tmp"),
    }
    done = subprocess.run(
        ["sh", "build.sh"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "NONSENSE" in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_table_of_settings_is_complete_and_right() -> None:
    section = PAGE.read_text().split("## Settings")[1].split("##")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*?) \|$", section, re.MULTILINE)
    assert [name for name, _ in rows] == list(ExternalSettings.model_fields)
    for name, text in rows:
        if written := re.match(r"`([^`]+)`", text):
            if name == "advertise":
                continue  # that of another setting
            read = ExternalSettings.model_validate({name: yaml.safe_load(written[1])})
            assert getattr(read, name) == getattr(ExternalSettings(), name)
        else:
            assert getattr(ExternalSettings(), name) is None


@pytest.mark.needs("shellcheck")
def test_the_script_is_clean() -> None:
    # a function that only a trap calls looks unreachable to it
    for command in (["sh", "-n"], ["shellcheck", "--exclude=SC2317,SC2329", "-"]):
        subprocess.run(command, input=page_script().encode(), check=True)
