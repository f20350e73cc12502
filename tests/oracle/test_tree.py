"""What the recorder makes of layers."""

from __future__ import annotations

import io
import tarfile
from typing import Any

from oracle.corpus import pack
from oracle.tree import Tree, merged, plain_config


def tree_of(*layers: dict[str, Any], times: bool = False) -> Tree:
    return merged([tarfile.open(fileobj=io.BytesIO(pack(layer))) for layer in layers], times=times)


def test_a_later_layer_hides_removes_and_replaces() -> None:
    below = {"d/": "", "d/a": "1", "d/b": "2", "e/": "", "e/c": "3", "f/": "", "f/g": "4"}
    above = {"d/.wh.a": "", "e/.wh..wh..opq": "", "e/new": "5", "f": "a file", ".wh.absent": ""}
    assert tree_of(below, above) == {
        "d": "dir 0755 0:0",
        "d/b": "file 0644 0:0 '2'",
        "e": "dir 0755 0:0",
        "e/new": "file 0644 0:0 '5'",
        "f": "file 0644 0:0 'a file'",
    }


def test_what_a_layer_removes_it_may_hold_itself() -> None:
    assert tree_of({"d/": "", "d/a": "1"}, {".wh.d": "", "d/": {"mode": "700"}, "d/b": "2"}) == {
        "d": "dir 0700 0:0",
        "d/b": "file 0644 0:0 '2'",
    }


def test_every_kind_of_file_is_told() -> None:
    files = {
        "b": {
            "content": "é",
            "owner": "1:2",
            "mode": "4755",
            "xattr": {"user.k": "v", "security.capability": "v"},
        },
        "a": {"hard": "b"},
        "l": {"link": "b"},
        "p": {"fifo": True},
    }
    digest = "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"
    assert tree_of(files, times=True) == {
        "a": f"file 4755 1:2 at 1000000000 security.capability=76 2 bytes, sha256 {digest}",
        "b": "same as a",
        "l": "link 0777 0:0 at 1000000000 -> b",
        "p": "fifo 0644 0:0 at 1000000000",
    }


def test_a_configuration_is_told_without_what_is_empty() -> None:
    document = {"config": {"Cmd": ["a"], "Labels": None, "WorkingDir": "/"}, "author": "me", "os": "linux"}
    assert plain_config(document) == {"Cmd": ["a"], "author": "me"}
