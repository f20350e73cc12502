"""Wildcards match what Go's filepath.Match, Moby's ignore files and BuildKit's substitutions match."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable

import pytest
from e2b_dockerfile_utils import PatternMatcher
from hypothesis import given, settings
from hypothesis import strategies as st

from firebuild_bootstrap.context.tree import IgnoreRules
from firebuild_bootstrap.errors import InputError
from firebuild_bootstrap.matching import BadPattern, Pattern, has_wildcard


@pytest.mark.parametrize(
    ("pattern", "name", "result"),
    [
        ("", "", True),
        ("", "a", False),
        ("abc", "abc", True),
        ("abc", "abcd", False),
        ("*", "", True),
        ("*", "abc", True),
        ("*c", "abc", True),
        ("*c", "ccc", True),
        ("a*", "a", True),
        ("a*", "abc", True),
        ("a*", "ab/c", False),
        ("a*/b", "abc/b", True),
        ("a*/b", "a/c/b", False),
        ("**", "abc", True),
        ("**", "a/b", False),
        ("a*b*c*d*e*/f", "axbxcxdxe/f", True),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/f", True),
        ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", False),
        ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", False),
        ("a*b?c*x", "abxbbxdbxebxczzx", True),
        ("a*b?c*x", "abxbbxdbxebxczzy", False),
        ("*x", "xxx", True),
        ("ab[c]", "abc", True),
        ("ab[b-d]", "abc", True),
        ("ab[e-g]", "abc", False),
        ("ab[g-e]", "abf", False),
        ("ab[^c]", "abc", False),
        ("ab[^b-d]", "abc", False),
        ("ab[^e-g]", "abc", True),
        ("ab[!c]", "abd", False),
        ("ab[!c]", "ab!", True),
        ("[a-ζ]*", "β", True),
        ("*[a-ζ]", "A", False),
        ("[[]", "[", True),
        ("[a]b]", "ab]", True),
        ("[]a]x", "", None),
        ("[\\]a]", "]", True),
        ("[\\-]", "-", True),
        ("[x\\-]", "x", True),
        ("[x\\-]", "-", True),
        ("[x\\-]", "z", False),
        ("[\\-x]", "-", True),
        ("[\\-x]", "a", False),
        ("[^]", "a", None),
        ("a\\*b", "a*b", True),
        ("a\\*b", "ab", False),
        ("\\a", "a", True),
        ("a?b", "a☺b", True),
        ("a[^a]b", "a☺b", True),
        ("a???b", "a☺b", False),
        ("a?b", "a/b", False),
        ("?", "/", False),
        ("*", ".hidden", True),
        ("a(b)+.c", "a(b)+.c", True),
        ("a\nb?", "a\nbc", True),
    ],
)
def test_a_pattern_matches_as_in_go(pattern: str, name: str, result: bool | None) -> None:
    if result is None:
        with pytest.raises(BadPattern):
            Pattern.path(pattern)
    else:
        assert Pattern.path(pattern).matches(name) is result


@pytest.mark.parametrize(
    "pattern",
    [
        "[",
        "[^",
        "[^bc",
        "a[",
        "[]a]",
        "[-]",
        "[x-]",
        "[-x]",
        "[a-b-c]",
        "\\",
        "a\\",
        "[\\",
        "[a\\",
        "[a-\\",
        "[]",
    ],
)
def test_a_malformed_pattern_is_an_error(pattern: str) -> None:
    with pytest.raises(BadPattern, match=r"never closed|has to be escaped|single backslash"):
        Pattern.path(pattern)


@given(
    st.lists(st.sampled_from(["*", "?", "a", "b", ".", "[ab]", "[^a]"]), max_size=8).map("".join),
    st.text("ab.c", max_size=10),
)
def test_without_slashes_a_pattern_agrees_with_the_shell(pattern: str, name: str) -> None:
    translated = fnmatch.translate(pattern.replace("[^", "[!"))
    assert Pattern.path(pattern).matches(name) is (re.match(translated, name) is not None)


@given(st.text("ab*?[]^-\\/", max_size=10), st.text("ab*?[]^-\\/", max_size=10))
def test_any_pattern_is_matched_or_malformed(pattern: str, name: str) -> None:
    try:
        compiled = Pattern.path(pattern)
    except BadPattern:
        return
    assert compiled.matches(name) in (True, False)


# --- time ------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


@pytest.mark.parametrize("read", [Pattern.path, Pattern.shell])
def test_stars_take_no_time_of_their_own(read: Callable[[str], Pattern]) -> None:
    text = "a" * 4000
    for pattern in (read("*a" * 60 + "b"), read("*" * 3000 + "b"), read("a*" * 60 + "b")):
        assert not pattern.matches(text)
        assert seconds(lambda pattern=pattern: pattern.matches(text)) < 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["*a*b", "*a" * 30 + "b", "?*" * 30 + "b", "a*b", "a*", "*", "?", "a"])
def test_substitutions_take_no_time_of_their_own(text: str) -> None:
    pattern, value = Pattern.shell(text), "a" * 20_000

    def everything() -> None:
        for longest in (True, False):
            pattern.without_prefix(value, longest=longest)
            pattern.without_suffix(value, longest=longest)
        pattern.matches_in(value)
        pattern.matches_in(value + "\n" + value + "b")

    assert seconds(everything) < 3


@pytest.mark.parametrize(
    "rule", ["*a*a*a*a*a*a*a*a*b", "**/a**/a**/a**/a*b", "**a" * 20 + "b", "[a]*" * 20 + "b"]
)
def test_ignore_rules_take_no_time_of_their_own(rule: str) -> None:
    path = "/".join(["a" * 120] * 30)
    rules = IgnoreRules(rule)
    assert not rules.ignores(path)
    assert seconds(lambda: IgnoreRules(rule).ignores(path)) < 1


def test_many_ignore_rules_cost_many_files_little() -> None:
    plain = IgnoreRules("\n".join(f"build/output/{number}/*.o\ncache-{number}" for number in range(2000)))
    paths = [f"source/module{number}/file{number}.c" for number in range(2000)]
    assert seconds(lambda: [plain.ignores(path) for path in paths]) < 5
    assert plain.ignores("cache-1999/x")
    assert plain.ignores("build/output/7/a.o")


# --- against other implementations -------------------------------------------------------------------

_RULES = st.lists(
    st.tuples(
        st.sampled_from(["", "", "!"]),
        st.lists(
            st.sampled_from(["a", "b", "/", "*", "**", "**/", "?", "[ab]", "[^a]", ".", "\\*"]),
            min_size=1,
            max_size=6,
        ).map("".join),
    ).map("".join),
    min_size=1,
    max_size=5,
)
_PATHS = st.lists(st.text("ab.c*", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)


@settings(max_examples=400, deadline=None)
@given(rules=_RULES, paths=st.lists(_PATHS, min_size=1, max_size=4))
def test_ignore_rules_agree_with_the_port_of_mobys_matcher(rules: list[str], paths: list[str]) -> None:
    try:
        port = PatternMatcher(rules)
    except ValueError:
        with pytest.raises(InputError):
            IgnoreRules("\n".join(rules))
        return
    ours = IgnoreRules("\n".join(rules))
    for path in paths:
        assert ours.ignores(path) is port.matches(path)
        directory = path.rpartition("/")[0]
        if directory and port.matches(directory) and not port.matches(path):
            assert ours.may_keep_below(directory)


_SHELL = st.lists(st.sampled_from(["*", "?", "a", "b", ".", "\\*", "\\}", "\n"]), max_size=6).map("".join)


@settings(max_examples=400, deadline=None)
@given(pattern=_SHELL, value=st.text("ab.*}\n", max_size=12))
def test_substitutions_agree_with_regular_expressions(pattern: str, value: str) -> None:
    signs = {"*": ".*", "?": ".", "\\*": r"\*", "\\}": "}"}
    words = re.findall(r"\\.|.|\n", pattern)
    long = re.compile("".join(signs.get(word, re.escape(word)) for word in words))
    short = re.compile("".join(signs.get(word, re.escape(word)).replace(".*", ".*?") for word in words))
    ours = Pattern.shell(pattern)
    for longest, expression in ((True, long), (False, short)):
        match = expression.match(value)
        assert ours.without_prefix(value, longest=longest) == (value[match.end() :] if match else value)
    found = [match.span() for match in long.finditer(value)]
    # Of empty matches right behind another one Python counts what Go does not.
    ends = {end for begin, end in found if begin != end}
    assert ours.matches_in(value) == [(b, e) for b, e in found if b != e or b not in ends]
    assert ours.matches_in(value, limit=1) == found[:1]
    mirrored, backwards = Pattern.shell("".join(reversed(words))), value[::-1]
    for longest in (True, False):
        rest = mirrored.without_prefix(backwards, longest=longest)
        assert ours.without_suffix(value, longest=longest) == rest[::-1]


@pytest.mark.parametrize("text", ["\\a", "\\", "a\\"])
def test_a_malformed_pattern_of_a_substitution_is_an_error(text: str) -> None:
    with pytest.raises(BadPattern, match="invalid escape"):
        Pattern.shell(text)


def test_only_wildcards_make_a_pattern() -> None:
    assert [has_wildcard(text) for text in ("a*", "a?", "a[b", "a\\b", "plain", "")] == [True] * 3 + [
        False
    ] * 3


def test_a_range_of_an_ignore_rule_that_runs_backwards_is_an_error() -> None:
    with pytest.raises(InputError, match=r"'x\[b-a\]' is malformed: a range inside \[ \] runs backwards"):
        IgnoreRules("a\nx[b-a]\n")
