"""What importing the package costs, and what it offers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import firebuild_pki

SOURCES = Path(firebuild_pki.__file__).parent


def loaded_by(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_next_to_nothing() -> None:
    heavy = {"cryptography", "pydantic", "grpc", "yaml", "pluggy", "ssl", "importlib.metadata"}
    assert not heavy & loaded_by("import firebuild_pki")


def test_opening_an_authority_needs_neither_grpc_nor_a_vault_client_nor_files() -> None:
    loaded = loaded_by("from firebuild_pki import open_authority\nopen_authority().issue_server()")
    assert not {"grpc", "hvac", "requests", "firebuild_pki.pem_files"} & loaded
    assert not [name for name in loaded if name.startswith("firebuild_bootstrap")]


def test_settings_without_a_file_need_no_yaml() -> None:
    load = "from firebuild_bootstrap.settings import load_settings\nload_settings(None, {})"
    assert not {"yaml", "grpc"} & loaded_by(load)


def test_every_public_name_is_there_and_listed() -> None:
    for name in firebuild_pki.__all__:
        assert getattr(firebuild_pki, name) is not None
    assert set(firebuild_pki.__all__) <= set(dir(firebuild_pki))


def test_the_names_for_type_checkers_are_the_names_at_run_time() -> None:
    tree = ast.parse((SOURCES / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(homes) == sorted(firebuild_pki.__all__)
    assert homes == {name: f"firebuild_pki.{home}" for name, home in firebuild_pki._HOME_OF.items()}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'firebuild_pki' has no attribute 'nothing'"):
        _ = firebuild_pki.nothing


def test_only_the_modules_that_speak_it_import_grpc() -> None:
    importers = {
        path.relative_to(SOURCES).parts[0]
        for path in SOURCES.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "grpc" for alias in node.names)
    }
    assert importers <= {"grpc_credentials.py", "grpc_handshake.py", "conformance"}
