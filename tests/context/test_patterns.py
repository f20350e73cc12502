"""Wildcards match what Go's filepath.Match matches."""

from __future__ import annotations

import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebuild_bootstrap.context.patterns import BadPattern, Pattern, has_wildcard


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
            Pattern.compile(pattern)
    else:
        assert Pattern.compile(pattern).matches(name) is result


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
        Pattern.compile(pattern)


@given(
    st.lists(st.sampled_from(["*", "?", "a", "b", ".", "[ab]", "[^a]"]), max_size=8).map("".join),
    st.text("ab.c", max_size=10),
)
def test_without_slashes_a_pattern_agrees_with_the_shell(pattern: str, name: str) -> None:
    translated = fnmatch.translate(pattern.replace("[^", "[!"))
    assert Pattern.compile(pattern).matches(name) is (re.match(translated, name) is not None)


@given(st.text("ab*?[]^-\\/", max_size=10), st.text("ab*?[]^-\\/", max_size=10))
def test_any_pattern_is_matched_or_malformed(pattern: str, name: str) -> None:
    try:
        compiled = Pattern.compile(pattern)
    except BadPattern:
        return
    assert compiled.matches(name) in (True, False)


def test_many_stars_take_no_exponential_time() -> None:
    assert not Pattern.compile("*a" * 60 + "b").matches("a" * 250)


def test_only_wildcards_make_a_pattern() -> None:
    assert [has_wildcard(text) for text in ("a*", "a?", "a[b", "a\\b", "plain", "")] == [True] * 3 + [
        False
    ] * 3
