"""The README's code runs as it stands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import grpc
import pytest

README = Path(__file__).parents[1] / "README.md"


def hello(request: bytes, context: grpc.ServicerContext) -> bytes:
    assert b"ssl" in context.auth_context()["transport_security_type"]
    return b"hello " + request


def test_ten_lines_give_a_service_mutual_tls(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(code.split("with open_authority", 1)[1].splitlines()) <= 10
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(hello)
    service = grpc.method_handlers_generic_handler("my.Service", {"Hello": handler})
    exec(compile(code, "README.md", "exec"), {"my_service": service})
    assert capsys.readouterr().out == "b'hello world'\n"


def test_every_link_of_the_documents_leads_somewhere() -> None:
    root = README.parent
    documents = [*root.glob("*.md"), *root.glob("docs/**/*.md")]
    broken = [
        f"{document.relative_to(root)}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def test_nobody_is_told_to_install_a_package_that_is_not_there() -> None:
    """What is installed by name are tools that this project itself takes from the index."""
    root = README.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    known = {re.split(r"[^\w-]", name)[0] for name in project["dependency-groups"]["dev"]} | {"pre-commit"}
    wrong = []
    made_there = {"firebuild-clone", "firebuild-pki-openssl", "firebuild-pki-step"}  # by the line before it
    documents = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("plugins/*/*.md")]
    lines = [(page, line) for page in documents for line in page.read_text().splitlines()]
    installs = [(page, line) for page, line in lines if "pip install" in line]
    assert len(installs) > 4
    for page, line in installs:
        words = shlex.split(line.partition("pip install")[2].partition("#")[0].partition("&&")[0].rstrip("`"))
        for word in words:
            if word.startswith("-") or word in known or Path(word).name in made_there:
                continue
            if not any((base / word / "pyproject.toml").is_file() for base in (root, page.parent)):
                wrong.append(f"{page.relative_to(root)}: {word}")
    assert wrong == []
