"""`.dockerignore`: what does not exist for the build."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from context.finding import Find, error_of, paths, put
from firebuild_bootstrap.context import BuildContext
from firebuild_bootstrap.context.tree import MOST_WILD, IgnoreRules
from firebuild_bootstrap.dockerfile.graph import Files
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar

_NAMES = st.sampled_from(["a", "b", "c"])
_FILES = st.lists(st.lists(_NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6)
_RULES = st.lists(st.sampled_from(["a", "b/a", "!a", "!*/b", "*", "**/c", "!a/b/c", "a/*", "!b"]), max_size=4)


def test_ignored_files_do_not_exist(root: Path, find: Find) -> None:
    put(root, "keep", "drop", "d/keep", "d/drop.log", "e/x", "node_modules/p/q")
    (root / ".dockerignore").write_text(
        "\ufeff# comment\n\ndrop\n**/*.log\ne\n/node_modules/\n.dockerignore\n"
    )
    assert paths(find(".")) == ["", "d", "d/keep", "keep"]
    assert paths(find("*")) == ["", "keep", "keep"]
    error = error_of(find, "drop")
    assert error.hint == f"{root}/.dockerignore excludes it"
    assert error_of(find, "e/x").hint == f"{root}/.dockerignore excludes it"
    assert error_of(find, "e").message.startswith("'e' is not in")
    assert error_of(find, "keeep").hint == "in '.' there is: keep"


def test_the_last_match_wins_and_parents_of_kept_files_are_kept(root: Path, find: Find) -> None:
    put(root, "a/b/keep", "a/b/drop", "a/c/drop", "z")
    (root / ".dockerignore").write_text("*\n!a/b/keep\n")
    assert paths(find(".")) == ["", "a", "a/b", "a/b/keep"]
    assert paths(find("a/b")) == ["", "keep"]
    assert paths(find("*/b")) == ["", "keep"]
    assert "is not in" in error_of(find, "a/c").message
    assert find("z*").groups == ()


def test_rules_apply_to_what_a_link_leads_to_and_to_the_link(root: Path, find: Find) -> None:
    put(root, "secret/key", "open/f")
    (root / "to-key").symlink_to("secret/key")
    (root / "to-open").symlink_to("open/f")
    (root / ".dockerignore").write_text("secret\nto-open\n")
    assert "is not in" in error_of(find, "to-key").message
    assert "is not in" in error_of(find, "to-open").message
    assert "is not in" in error_of(find, "to-k*").message


def test_the_ignore_file_of_the_dockerfile_wins(root: Path) -> None:
    put(root, "a", "b", "docker/Dockerfile.dev")
    (root / ".dockerignore").write_text("a")
    (root / "docker/Dockerfile.dev.dockerignore").write_text("b\ndocker\n.dockerignore")
    with BuildContext(root, root / "docker/Dockerfile.dev") as context:
        assert paths(context.resource([Files(".")])) == ["", "a"]
    with BuildContext(root, root / "docker/Dockerfile") as context:
        assert "b" in paths(context.resource([Files(".")]))


def test_a_malformed_rule_is_an_error_at_its_line(root: Path) -> None:
    (root / ".dockerignore").write_text("fine\n[[a]\n!\n")
    with pytest.raises(InputError, match="illegal exclusion pattern") as caught:
        BuildContext(root)
    assert caught.value.location == Location(str(root / ".dockerignore"), 3)


def test_an_unreadable_ignore_file_is_an_error(root: Path) -> None:
    (root / ".dockerignore").write_bytes(b"fine\n\xff")
    with pytest.raises(InputError, match="ignore file can't be read: line 2 is not UTF-8\n"):
        BuildContext(root)
    (root / ".dockerignore").unlink()
    (root / ".dockerignore").mkdir()
    with pytest.raises(InputError, match="ignore file can't be read: Is a directory\n"):
        BuildContext(root)


def test_an_ignore_file_of_a_terabyte_is_an_error(root: Path) -> None:
    os.truncate(os.open(root / ".dockerignore", os.O_CREAT | os.O_WRONLY), 1 << 40)
    with pytest.raises(InputError, match="the ignore file can't be read: it is larger than 16 MiB"):
        BuildContext(root)


@pytest.mark.parametrize("place", ["a FIFO", "a device"])
def test_an_ignore_file_that_would_block_or_never_end_is_an_error(root: Path, place: str) -> None:
    if place == "a FIFO":
        os.mkfifo(root / ".dockerignore")
    else:
        (root / ".dockerignore").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="ignore file can't be read: it is not a regular file"):
        BuildContext(root)


def test_patterns_with_wildcards_have_a_bound_and_paths_have_none() -> None:
    wild = "".join(f"**/directory{number}/*.log\n" for number in range(MOST_WILD))
    paths = "".join(f"some/directory{number}\n!some/directory{number}/kept\n" for number in range(100_000))
    rules = IgnoreRules(wild + paths)
    assert rules.ignores("a/directory7/x.log")
    assert rules.ignores("some/directory99999")
    assert rules.may_keep_below("some/directory99999")
    assert not rules.may_keep_below("some/director")
    assert not rules.ignores("some/directory99999/kept")
    with pytest.raises(InputError) as caught:
        IgnoreRules(f"# one more\n{wild}!*.txt\n")
    assert str(caught.value).startswith(
        f".dockerignore:{MOST_WILD + 2}: it has more than 10000 patterns with wildcards"
    )


def test_what_a_path_of_many_names_keeps_takes_no_memory_for_each_of_them() -> None:
    path = "a/" * 1_000_000 + "kept"
    rules = IgnoreRules(f"a\n!{path}")
    assert rules.may_keep_below("a/a/a")
    assert not rules.may_keep_below("a/b")


def test_many_rules_that_cover_a_directory_cost_its_files_nothing() -> None:
    rules = IgnoreRules("src\n!src\n" * 3000)
    begin = time.process_time()
    assert not any(rules.ignores(f"src/{number % 50}/{number}") for number in range(5000))
    assert time.process_time() - begin < 3


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=_FILES, rules=_RULES)
def test_exactly_what_is_not_ignored_is_sent(
    tmp_path_factory: pytest.TempPathFactory, files: list[str], rules: list[str]
) -> None:
    root = tmp_path_factory.mktemp("context")
    for name in files:
        path = root / name
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    ignore = root.parent / f"{root.name}.dockerignore"
    ignore.write_text("\n".join(rules))
    with BuildContext(root, root.parent / root.name) as context:
        from e2b_dockerfile_utils import PatternMatcher

        matcher = PatternMatcher(rules)
        kept = {
            str(path.relative_to(root))
            for path in root.rglob("*")
            if path.is_file() and not matcher.matches(str(path.relative_to(root)))
        }
        entries = list(context.resource([Files(".")]).entries())
    assert {entry.path for entry in entries if entry.kind == tar.FILE} == kept
    seen = {""}
    for entry in entries[1:]:
        assert entry.path.rpartition("/")[0] in seen
        seen.add(entry.path)
