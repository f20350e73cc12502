"""docs/conformance.md lists every check and feature, and its example works as it stands."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from firebuild_pki.conformance import GROUPS, Feature, ProviderConformance, base

PATH = Path(__file__).parents[2] / "docs" / "conformance.md"
PAGE = PATH.read_text(encoding="utf-8")


def features() -> str:
    tree = ast.parse(inspect.getsource(Feature)).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = [one.value.value for one in tree.body if isinstance(one, ast.Expr)][1:]  # type: ignore[attr-defined]
    rows = [f"| `Feature.{one.name}` | {text} |" for one, text in zip(Feature, texts, strict=True)]
    return "\n".join(["| feature | what |", "|---|---|", *rows])


def checks() -> str:
    blocks = []
    for group in GROUPS:
        rows = ["| check | the contract | needs |", "|---|---|---|"]
        for name, check in vars(group).items():
            if name.startswith("test_"):
                needs = sorted(check.contract.needs) + ["that of the key"] * ("key_type" in _arguments(check))
                rows.append(f"| `{name}` | {check.contract.text} | {', '.join(needs)} |")
        blocks.append(f"### {str(group.__doc__).rstrip('.')}\n\n" + "\n".join(rows))
    return "\n\n".join(blocks)


def _arguments(check: object) -> list[str]:
    return list(inspect.signature(check).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text"), [("features", features()), ("checks", checks())], ids=str.upper)
def test_the_tables_are_those_of_the_kit(name: str, text: str) -> None:
    between = re.findall(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", PAGE, re.DOTALL)
    assert between == [text]


def test_every_check_belongs_to_a_group() -> None:
    listed = {name for group in GROUPS for name in vars(group) if name.startswith("test_")}
    assert listed == {name for name in dir(ProviderConformance) if name.startswith("test_")}


def test_the_table_of_fixtures_is_complete() -> None:
    table = PAGE.split("## What you can override")[1].split("A provider that is not installed")[0]
    fixtures = {name for name in vars(base.Checks) if name.startswith("ca_")} - {"ca_bench", "ca_spill"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == fixtures


PLUGIN = """
from typing import Any, Literal
from pydantic import Field
from firebuild_pki import CAError, SecretRef, Settings
from pki_conformance.current import Current, plugin


class StepSettings(Settings):
    url: str = Field(pattern="^https://")
    '''Where the CA listens.'''
    provisioner: str
    '''Who signs.'''
    password: SecretRef
    '''The password of the provisioner.'''


class Step(Current):
    def open(self) -> None:
        self.settings.password.resolve(self.context.environ)
        if self.settings.url.endswith(":1"):
            raise ConnectionRefusedError("nobody listens")
        super().open()

    def check(self) -> Any:
        from firebuild_pki import Note, NoteLevel
        return [Note("the CA answers", about="reachable", level=NoteLevel.OK)]

    def answered(self, request: Any) -> Any:
        if self.settings.provisioner != "builds":
            raise CAError("no such provisioner")
        return super().answered(request)


step = plugin("step", Step, StepSettings)
register_ca_providers = step.register_ca_providers
"""
SERVER = """
import types
import pytest

@pytest.fixture
def step_server():
    return types.SimpleNamespace(url="https://ca.example")
"""


def test_the_example_works_as_it_stands(tmp_path: Path) -> None:
    example, not_installed, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    imports = "from importlib.metadata import EntryPoint\nfrom firebuild_pki import PluginCatalog\n"
    head, tail = example.split("\n\n\ndef section")
    code = f"{imports}{head}\n\n{not_installed}\n\ndef section{tail}"
    (tmp_path / "test_step_conformance.py").write_text(code)
    (tmp_path / "step_pki.py").write_text(PLUGIN)
    (tmp_path / "conftest.py").write_text(SERVER)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not rsa", "-rs"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed, 6 skipped, 3 deselected in", done.stdout), done.stdout
    assert "declared unsupported: revoke: " in done.stdout
