"""The pages of docs/reference are what the code says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from firebuild_bootstrap.image.names import RESERVED_ENVIRONMENT
from support import REPO


def reference(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/reference"), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def texts(pages: Path) -> dict[str, str]:
    return {page.name: page.read_text() for page in pages.iterdir()}


def test_the_pages_are_up_to_date_and_one_that_says_something_else_is_found_and_mended(
    tmp_path: Path,
) -> None:
    pages = tmp_path / "docs/reference"
    shutil.copytree(REPO / "docs/reference", pages)
    right = (pages / "cli.md").read_text()
    (pages / "cli.md").write_text(right.replace("`--no-cache`", "`--no-caching`"))
    (pages / "events.md").unlink()
    done = reference(tmp_path, "--check")
    assert done.returncode == 1
    assert "+| `--no-cache` |" in done.stderr
    assert "+# Events" in done.stderr
    assert "run `make tables`" in done.stderr
    reference(tmp_path)
    assert texts(pages) == texts(REPO / "docs/reference")


def test_the_environment_variables_that_are_read_are_listed() -> None:
    table = (REPO / "docs/reference/settings.md").read_text().partition("## Environment")[2]
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE))
    read = re.compile(
        r'environ(?:ment)?(?:\.get\(|\[)"([A-Z][A-Z_]+)"|envvar="([A-Z_]+)"|_VARIABLE: Final = "([A-Z_]+)"'
    )
    found = {
        name
        for path in (REPO / "src").rglob("*.py")
        for names in read.findall(path.read_text())
        for name in names
        if name and not name.startswith(("XDG_", "GRPC_", "LD_", "COMP_"))
    }
    assert found >= {"FIREBUILD_HOME", "BUILDKIT_PROGRESS", "DOCKER_CONFIG"}
    # PATH and its like are everybody's; `ca vault-setup` says what it reads of Vault's.
    assert found - listed <= {"HOME", "PATH", "TERM", "TMPDIR", "VAULT_ADDR", "BAO_ADDR"}
    assert listed >= RESERVED_ENVIRONMENT


def test_the_exit_statuses_of_the_readme_are_those_of_the_errors() -> None:
    table = re.compile(r"^\| (\d+) \|", re.MULTILINE)
    readme = table.findall((REPO / "README.md").read_text())
    assert readme == table.findall((REPO / "docs/reference/errors.md").read_text())
    assert len(readme) == 11
