"""What is packed of a stage for those who take files from it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from firebuild_bootstrap.context.build_context import FileTree
from firebuild_bootstrap.context.snapshot import SnapshotRoot
from firebuild_bootstrap.dockerfile.graph import Files, StageRef
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.image.worker.taking import Taken
from firebuild_bootstrap.layers.tar import write_layer
from firebuild_bootstrap.layers.tree import tree_entries


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name in ("a/b/file", "c/d/file", "c/other", "w1/file", "[x]/file", "big/one", "big/two"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "c/d/name").hardlink_to(root / "a/b/file")
    for name, text in {
        "a/up": "../c",
        "abs": "/a/b",
        "loop": "loop",
        "w2": "c/d",
        "w3": "gone",
        "out": "../../c/other",
        "a/x": "../[x]",
        "*": "*",
        "far": "abs/../up/d",
    }.items():
        (root / name).symlink_to(text)
    return root


def archive(root: Path, target: Path, only: Taken | None) -> Path:
    data = io.BytesIO()
    write_layer(data, tree_entries(str(root), only=only))
    target.write_bytes(data.getvalue())
    return target


def seen(archive: Path, pattern: str, *, parents: bool) -> Any:
    tree = FileTree(SnapshotRoot(archive), "the stage 'x'")
    try:
        resource = tree.resource((Files(pattern, StageRef(0)),), parents=parents)
        return [(entry.path, entry.mode) for entry in resource.entries()]
    except InputError as error:
        return error.message
    finally:
        tree.close()


@pytest.mark.parametrize(
    "pattern",
    [
        *("/", "a", "/a/b/file", "/a/up/d", "abs/file", "far", "/c/./d/../other", "../c", "out", "a/up/d/n*"),
        *(
            "/w*",
            "w?",
            "*",
            "/*/d",
            "a/*/d/file",
            "loop",
            "missing/x",
            "c/other/x",
            r"\[x\]",
            r"a/\x",
            "a/x/f*",
        ),
        *("[wa]*/file", "big/t*", "a/*/other", "c/*/n*", "*/*/file", "*/d/f*", "?/*/*", "w?/./file", "*/d"),
        *("a/b*/../up/*", "**/file", "a/**/file", "*/missing/x", r"*/\d/file", "w*/file"),
    ],
)
def test_nothing_is_missing_of_what_a_pattern_means(root: Path, tmp_path: Path, pattern: str) -> None:
    whole = archive(root, tmp_path / "whole", None)
    part = archive(root, tmp_path / "part", Taken(str(root), [pattern]))
    for parents in (False, True):
        assert seen(part, pattern, parents=parents) == seen(whole, pattern, parents=parents)


def test_what_no_pattern_means_is_not_read(root: Path) -> None:
    def names(*patterns: str) -> list[str]:
        return [entry.path for entry, _ in tree_entries(str(root), only=Taken(str(root), patterns))]

    assert names("/a/up/d/file") == ["", "a", "a/up", "c", "c/d", "c/d/file"]
    assert names("big/one", "/w1") == ["", "big", "big/one", "w1", "w1/file"]
    assert names("c/*/file") == ["", "c", "c/d", "c/d/file"]
    assert "c/other" not in names("*/d/*")


def test_a_pattern_that_leads_to_nothing_takes_the_names_that_its_error_tells(root: Path) -> None:
    def names(pattern: str) -> set[str]:
        return {entry.path for entry, _ in tree_entries(str(root), only=Taken(str(root), [pattern]))}

    assert names("missing") == names("missing/x/*") == {"", *(path.name for path in root.iterdir())}
    assert names("/a/up/d/fill") == {
        "",
        "a",
        "a/up",
        "c",
        "c/d",
        *(f"c/d/{x.name}" for x in (root / "c/d").iterdir()),
    }
    assert names("c/d/file/below") >= {"c/d/file"}
