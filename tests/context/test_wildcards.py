"""Patterns, and sources that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from context.finding import Find, error_of, paths, put
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.layers import tar


def test_a_missing_file_hints_at_the_nearest_names_in_its_directory(root: Path, find: Find) -> None:
    put(root, "src/main.py", "src/other.py")
    error = error_of(find, "src/mian.py")
    assert error.message == f"'src/mian.py' is not in the build context {root}"
    assert error.hint == "in 'src' there is: main.py"
    assert error_of(find, "scr/main.py").hint == "in '.' there is: src"
    assert error_of(find, "src/zzz").hint == "in 'src' there is: main.py, other.py"
    assert error_of(find, "src/main.py/x").hint == "in 'src' there is: main.py"


def test_a_missing_file_of_an_empty_context_says_so(find: Find) -> None:
    assert error_of(find, "a").hint == "in '.' there is: nothing"


def test_a_context_that_is_no_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for name in ("f", "nothing"):
        with pytest.raises(InputError, match="expected a directory"):
            BuildContext(tmp_path / name)


def test_wildcards_match_names_in_order(root: Path, find: Find) -> None:
    put(root, "a1", "a2", "b1", "x/a3", ".a4")
    assert paths(find("a*")) == ["a1", "a2"]
    assert paths(find("?1")) == ["a1", "b1"]
    assert paths(find("*/a[0-9]")) == ["a3"]
    assert paths(find("x/*")) == ["a3"]
    assert paths(find("../[a-b]1")) == ["a1", "b1"]


def test_a_wildcard_may_match_directories_whose_contents_are_sent(root: Path, find: Find) -> None:
    put(root, "one/f", "two/g", "three")
    assert paths(find("t*")) == ["three", "", "g"]


def test_a_wildcard_in_the_middle_needs_directories(root: Path, find: Find) -> None:
    put(root, "a/f", "b/sub/f", "c")
    (root / "l").symlink_to("a")
    assert [entry.source for entry in find("*/f").entries()] == ["a/f"]
    assert [entry.source for entry in find("*/*/f").entries()] == ["b/sub/f"]


def test_links_that_match_are_followed(root: Path, find: Find) -> None:
    put(root, "a/f")
    (root / "link").symlink_to("a/f")
    (entry,) = find("l*").entries()
    assert (entry.kind, entry.path) == (tar.FILE, "link")


def test_special_characters_can_be_escaped(root: Path, find: Find) -> None:
    put(root, "a*", "ab", "c[0]", "back\\slash")
    assert paths(find("a\\*")) == ["a*"]
    assert paths(find("c[[]0]")) == ["c[0]"]
    assert paths(find("back\\slash")) == ["back\\slash"]


def test_a_pattern_that_matches_nothing_is_fine_beside_a_source_that_exists(root: Path, find: Find) -> None:
    put(root, "package.json")
    assert paths(find("package.json", "package-lock.json*", "d*/*")) == ["package.json"]


@pytest.mark.parametrize("pattern", ["*.none", "nowhere*/*", "d/*.none", "f/*", "*/*/*"])
def test_a_pattern_that_matches_nothing_at_all_sends_nothing(root: Path, find: Find, pattern: str) -> None:
    put(root, "f", "d/g")
    assert find(pattern).groups == ()


def test_the_directory_before_a_pattern_has_to_be_there(root: Path, find: Find) -> None:
    put(root, "f", "d/g")
    missing = error_of(find, "f", "d/nowhere/*")
    assert missing.message.startswith("'d/nowhere/*' is not in the build context")
    assert missing.hint == "in 'd' there is: g"


def test_a_malformed_pattern_is_an_error(find: Find) -> None:
    assert error_of(find, "a[").message == "the pattern 'a[' is malformed: a [ is never closed"
