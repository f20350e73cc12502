"""The tables of options in the documentation are those of the settings models."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from firebuild_pki import Duration, KeyType, SecretRef, Settings, installed_providers
from firebuild_pki.config import PositiveDuration
from support import REPO

SCRIPT = REPO / "scripts/option-tables"


def tables(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--root", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The documentation alone, with tables that are right."""
    shutil.copytree(REPO / "docs", tmp_path / "docs")
    for page in (REPO / "plugins").glob("*/README.md"):
        copy = tmp_path / page.relative_to(REPO)
        copy.parent.mkdir(parents=True)
        shutil.copy(page, copy)
    return tmp_path


def test_every_provider_has_a_page_with_a_table_that_is_up_to_date() -> None:
    for plugin in installed_providers():
        page = REPO / "docs/providers" / f"{plugin.name}.md"
        assert page.exists() or (REPO / "plugins" / plugin.distribution / "README.md").exists(), plugin
    done = tables(REPO, "--check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("found", "planted"),
    [
        ("| `backdate` | duration |", "| `backdate` | string |"),
        ("| no | `24h` | Upper bound", "| no | `12h` | Upper bound"),
        ("| `key_type` |", "| `key_typ` |"),
        ("<!-- /options -->", "| `invented` | string | no |  | Nothing. |\n<!-- /options -->"),
    ],
)
def test_a_wrong_row_is_found_and_mended(checkout: Path, found: str, planted: str) -> None:
    page = checkout / "docs/providers/embedded.md"
    right = page.read_text()
    assert right.count(found) == 1
    page.write_text(right.replace(found, planted))
    done = tables(checkout, "--check")
    assert done.returncode == 1
    wrong = next(line for line in planted.splitlines() if line.startswith("| `") or "12h" in line)
    assert any(line.startswith("-") and wrong in line for line in done.stderr.splitlines())
    assert "run `make tables`" in done.stderr
    tables(checkout)
    assert page.read_text() == right


def test_a_missing_row_is_found(checkout: Path) -> None:
    page = checkout / "docs/providers/embedded.md"
    lines = page.read_text().splitlines(keepends=True)
    page.write_text("".join(line for line in lines if "`ca_lifetime` |" not in line))
    done = tables(checkout, "--check")
    assert done.returncode == 1
    assert "+| `ca_lifetime` |" in done.stderr


@pytest.mark.parametrize("text", [None, "# A page without a table\n"])
def test_a_page_that_is_missing_or_has_no_place_for_the_table_is_found(
    checkout: Path, text: str | None
) -> None:
    page = checkout / "docs/providers/embedded.md"
    page.unlink()
    if text is not None:
        page.write_text(text)
    done = tables(checkout, "--check")
    assert done.returncode == 1
    assert "docs/providers/embedded.md: expected the lines <!-- options -->" in done.stderr


class ByToken(Settings):
    method: Literal["token"]
    """Use a token."""
    token: SecretRef
    """Where it is."""


class ByFile(Settings):
    method: Literal["a-file"]
    """Use a file."""
    path: Path = Path("/run/token")
    """Where it is."""


class Nested(Settings):
    wait: Duration = timedelta(seconds=90)
    """How long; a | in the text
    and a second line."""


class Everything(Settings):
    address: str | list[str]
    """Where."""
    retries: int = 3
    """How often."""
    kind: KeyType | None = None
    """Which key."""
    limit: PositiveDuration = timedelta(hours=1)
    """How long at most."""
    files: tuple[Path, ...] = ()
    """Which files."""
    nested: Nested = Nested()
    """More."""
    auth: Annotated[ByToken | ByFile, Field(discriminator="method")]
    """How to log in."""


def test_every_kind_of_setting_has_its_words() -> None:
    table = runpy.run_path(str(SCRIPT))["table"]
    assert table(Everything).splitlines()[2:] == [
        "| `address` | string or list of strings | yes |  | Where. |",
        "| `retries` | whole number | no | `3` | How often. |",
        "| `kind` | `p256`, `p384`, `rsa2048`, `rsa3072`, `rsa4096` | no |  | Which key. |",
        "| `limit` | duration above zero | no | `1h` | How long at most. |",
        "| `files` | list of paths | no |  | Which files. |",
        "| `nested.wait` | duration | no | `1m30s` | How long; a \\| in the text and a second line. |",
        "| `auth.method` | `token`, `a-file` | yes |  | How to log in. |",
        "| `auth.token` | `{env: NAME}` or `{file: PATH}` | yes |  | With `method: token`: Where it is. |",
        "| `auth.path` | path | no | `/run/token` | With `method: a-file`: Where it is. |",
    ]
