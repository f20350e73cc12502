"""The README's code runs as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
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


@pytest.mark.needs("userns")
def test_the_first_example_works_as_it_stands(tmp_path: Path) -> None:
    _, _, after = README.read_text().partition("<!-- tested: tests/test_readme.py runs the commands")
    commands, expected = re.findall(r"(?:^    .*\n)+", after.partition("-->")[2], re.MULTILINE)[:2]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FIREBUILD", "XDG"))}
    path = f"{Path(sys.executable).parent}:{environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-euc", commands],
        cwd=README.parent,
        env={**environ, "HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    pattern = re.escape("".join(line[4:] for line in expected.splitlines(keepends=True)))
    for shown, real in [
        ("…", "(?s:.*)"), ("~", re.escape(str(tmp_path))), (r"b92064b40268b", "b[0-9a-f]{12}"),
        (r"18\.5\ MiB", r"[0-9.]+\ MiB"),
    ]:  # fmt: skip
        assert re.escape(shown) in pattern or shown in pattern
        pattern = pattern.replace(re.escape(shown) if re.escape(shown) in pattern else shown, real)
    pattern = re.sub(r"\d+\\\.\ds", r"\\d+\\.\\ds", pattern)
    # A slow machine also tells what takes more than a second.
    told = re.sub(r"(?m)^[a-z][^:\n]*( …|: \d+\.\ds(, .*)?)\n", "", done.stdout)
    assert re.fullmatch(pattern, told), done.stdout


def test_nobody_is_told_to_install_a_package_that_is_not_there() -> None:
    """What is installed by name are tools that this project itself takes from the index."""
    root = README.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())
    known = {re.split(r"[^\w-]", name)[0] for name in project["dependency-groups"]["dev"]} | {"pre-commit"}
    wrong = []
    made_there = {"firebuild-clone", "firebuild-pki-step"}  # by the line before it
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
