"""docs/plugin-services.md says what is true: its blocks run, its table of state is what the kit compares."""

from __future__ import annotations

from pathlib import Path

import pytest

import firebuild_pki
from firebuild_pki import http
from firebuild_pki.conformance.watching import _state

PAGE = (Path(__file__).parents[2] / "docs/plugin-services.md").read_text()
BLOCKS = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_blocks_run(block: str) -> None:
    exec(compile(block, "docs/plugin-services.md", "exec"), {})


def test_what_the_table_names_is_public() -> None:
    table = PAGE.split("## Settings")[0]
    assert {"open_key", "check_key_uri", "order_chain"} <= set(firebuild_pki.__all__)
    names = {word.split("(")[0].rpartition(".")[2] for word in table.split("`")[1::2] if word[0].isupper()}
    assert len(names) > 5
    for name in names - {"notes"}:
        assert hasattr(firebuild_pki, name) or hasattr(http, name), name


def test_the_state_of_the_process_that_the_kit_compares_is_written_down() -> None:
    listed = PAGE.split("## What belongs to the whole process")[1].casefold()
    for words in (
        *("environment", "working directory", "umask", "signal", "logger", "ssl", "limits", "excepthook"),
        *("priority", "timeout of sockets", "locale"),
    ):
        assert words in listed
    own = {name for name in _state() if not name.startswith("the environment variable")}
    assert len(own) == 10  # a new one belongs into the page as well
