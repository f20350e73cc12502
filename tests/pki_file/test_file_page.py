"""docs/providers/file.md: its commands make CAs and certificates that its settings accept."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from firebuild_pki.grpc_handshake import handshake
from firebuild_pki.providers.file.settings import FileSettings
from pki_file.operator_files import Shop, opened

PAGE = (Path(__file__).parents[2] / "docs/providers/file.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def examples() -> list[dict[str, Any]]:
    loaded = [yaml.safe_load(text) for text in fenced("yaml")]
    return [one["ca"]["file"] for one in loaded if "ca" in one]


def test_the_examples_together_show_every_setting_but_the_repeated_ones() -> None:
    shown = set().union(*examples())
    repeated = {"server_key_passphrase", "client_key_passphrase"}
    assert shown == FileSettings.model_fields.keys() - repeated


@pytest.mark.needs("openssl")
def test_the_commands_make_what_both_examples_need(shop: Shop) -> None:
    environ = {**os.environ, "CA_PASSPHRASE": "correct horse"}
    for script in fenced("sh"):
        subprocess.run(
            ["sh", "-eu", "-c", script], cwd=shop.place, env=environ, check=True, capture_output=True
        )
    shop.write("ca-passphrase", "correct horse\n")
    shop.write("chain.pem", shop.read("root.pem"))
    signing, pairs = ({name: moved(value, shop) for name, value in one.items()} for one in examples())
    with opened(signing) as authority:
        handshake(authority.issue_server(), authority.issue_guest())
        assert authority.warnings == ()
    pairs |= {"chain": shop.path("ca.pem"), "server_name": "server.builds.example.com"}
    with opened(pairs) as authority:
        handshake(authority.issue_server(), authority.issue_guest())
        assert authority.warnings == ()


def moved(value: Any, shop: Shop) -> Any:
    """The same settings, with the files where the test has them."""
    if isinstance(value, list):
        return [moved(one, shop) for one in value]
    if isinstance(value, dict):
        return {name: moved(one, shop) for name, one in value.items()}
    return str(shop.path(os.path.basename(value))) if value.startswith("/") else value
