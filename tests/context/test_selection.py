"""--exclude and --parents: which files of a source are sent, and under which names."""

from __future__ import annotations

from pathlib import Path

import pytest

from firebuild_bootstrap.context import BuildContext, Entry, FileTree
from firebuild_bootstrap.context.root import ContextRoot
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.errors import InputError, Location

HERE = Location("Dockerfile", 2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.md", "b.txt", "d/e/a", "d/e/b.o", "d/f/a", "d/README.md", "d/x.md", "other/d/deep"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "d").chmod(0o711)
    return tmp_path


def sent(root: Path, *sources: str, exclude: tuple[str, ...] = (), parents: bool = False) -> list[Entry]:
    with BuildContext(root) as context:
        files = [Files(source) for source in sources]
        return list(context.resource(files, exclude=exclude, parents=parents, location=HERE).entries())


def names(entries: list[Entry]) -> list[str]:
    return [entry.path for entry in entries]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (("*.md",), ["", "e", "e/a", "e/b.o", "f", "f/a"]),
        (("*.md", "!README.md", "f"), ["", "README.md", "e", "e/a", "e/b.o"]),
        (("**/a", "**/*.md"), ["", "e", "e/b.o", "f"]),
        (("*", "!e/a"), ["", "e", "e/a"]),
        (("#x", " "), ["", "README.md", "e", "e/a", "e/b.o", "f", "f/a", "x.md"]),
    ],
)
def test_patterns_are_relative_to_the_source(root: Path, exclude: tuple[str, ...], left: list[str]) -> None:
    assert names(sent(root, "d", exclude=exclude)) == left


def test_a_file_that_is_named_is_sent_whatever_is_excluded(root: Path) -> None:
    assert names(sent(root, "a.md", "*.txt", exclude=("*",))) == ["a.md", "b.txt"]


@pytest.mark.parametrize(
    ("source", "paths"),
    [
        ("d/e/a", ["", "d", "d/e", "d/e/a"]),
        ("./d/e", ["", "d", "d/e", "d/e/a", "d/e/b.o"]),
        ("d/*/a", ["", "d", "d/e", "d/e/a", "d/f", "d/f/a"]),
        ("**/*.md", ["", "a.md", "d", "d/README.md", "d/x.md"]),
        ("d/./e/a", ["", "e", "e/a"]),
        ("d/../other/./d", ["", "d", "d/deep"]),
        ("d/e/./", ["", "a", "b.o"]),
        ("*/./d", ["", "d", "d/deep"]),
    ],
)
def test_parents_keeps_the_directories_from_the_pivot_on(root: Path, source: str, paths: list[str]) -> None:
    entries = sent(root, source, parents=True)
    assert names(entries) == paths
    assert all(entry.from_directory for entry in entries)


def test_parents_keeps_the_modes_of_directories_and_excludes_from_the_pivot_on(root: Path) -> None:
    entries = sent(root, "d/e", parents=True, exclude=("d/e/a",))
    assert [(entry.path, entry.mode) for entry in entries][:2] == [("", 0o755), ("d", 0o711)]
    assert names(entries) == ["", "d", "d/e", "d/e/b.o"]


def test_with_parents_a_missing_name_is_an_error_and_an_unmatched_pattern_an_empty_directory(
    root: Path,
) -> None:
    with pytest.raises(InputError, match="'d/e/missing' is not in the build context") as caught:
        sent(root, "d/e/missing", parents=True)
    assert caught.value.location == HERE
    with pytest.raises(InputError, match="is not in the build context"):
        sent(root, "d/./missing", parents=True)
    assert names(sent(root, "*.none", parents=True)) == names(sent(root, "d/./*.none", parents=True)) == [""]
    assert sent(root, "*/./*.none", parents=True) == []


def test_ignored_files_stay_ignored(root: Path) -> None:
    (root / ".dockerignore").write_text("**/*.o\nd/f\n")
    assert names(sent(root, "d", parents=True, exclude=("**/*.md",))) == ["", "d", "d/e", "d/e/a"]


def test_files_of_another_tree_keep_their_owners_and_are_called_by_its_name(root: Path) -> None:
    (root / ".dockerignore").write_text("*")
    with FileTree(ContextRoot(root / "d"), "the stage 'build'") as tree:
        entries = list(tree.resource([Files("e"), Files("x.md")]).entries())
        owner = (root.stat().st_uid, root.stat().st_gid)
        # The directory itself is the destination's, which belongs to root.
        assert [(entry.path, entry.owner) for entry in entries] == [
            ("", (0, 0)),
            ("a", owner),
            ("b.o", owner),
            ("x.md", owner),
        ]
        with pytest.raises(InputError, match="'nothing' is not in the stage 'build'"):
            tree.resource([Files("nothing")])
