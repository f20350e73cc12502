"""The README's code runs as it stands."""

from __future__ import annotations

import re
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
