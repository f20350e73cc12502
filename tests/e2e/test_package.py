"""The distribution builds, installs into an empty environment, and runs there."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support import REPO, Firebuild

pytestmark = [pytest.mark.long, pytest.mark.timeout(600), pytest.mark.xdist_group("package")]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPO)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    return out


def test_the_sdist_holds_what_a_packager_needs(distributions: Path) -> None:
    [sdist] = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "constraints.txt", "protos/rootfs_server.proto"} <= names
    assert {
        "config.example.yaml",
        "man/firebuild.1",
        "tests/conftest.py",
        "examples/hello/Dockerfile",
    } <= names


def test_the_wheel_is_typed_and_holds_both_packages(distributions: Path) -> None:
    [wheel] = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"firebuild_pki/py.typed", "firebuild_bootstrap/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith("tests")]
    assert [name for name in names if name.endswith("data/share/man/man1/firebuild.1")]
    for folder in ("providers/vault/templates/", "scaffold/"):  # what is not Python is in it too
        assert [one for one in names if one.startswith(f"firebuild_pki/{folder}") and not one.endswith(".py")]


@pytest.mark.needs("userns")
def test_a_fresh_environment_builds_an_image(distributions: Path, tmp_path: Path) -> None:
    [wheel] = distributions.glob("*.whl")
    pins = tmp_path / "pins.txt"
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins.write_text("\n".join(re.sub(r"\s*\\$", "", line) for line in lines if "==" in line))
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=100)
    install = [str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "--constraint", str(pins), str(wheel)], check=True, timeout=400)

    firebuild = Firebuild(tmp_path / "home", venv / "bin/firebuild")
    assert re.fullmatch(r"firebuild \d+\.\d+\.\d+\n", firebuild("--version").stdout)
    assert (venv / "share/man/man1/firebuild.1").exists()
    firebuild("base", "from-host", "host")
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM host\nRUN echo installed > /proof\n")
    arguments = ("--dockerfile", dockerfile, "--context", tmp_path, "--output", "tar")
    firebuild("rootfs", *arguments, "--tag", "t/fresh:1", cwd=tmp_path)
    assert "t/fresh:1" in firebuild("images", "list").stdout
