"""How options that are lists are read: as BuildKit and buildx do, by the rules of RFC 4180."""

from __future__ import annotations

import pytest

from firebuild_bootstrap.sizes import join_fields, split_fields


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", []),
        (",", ["", ""]),
        ("a", ["a"]),
        ("a,b=c, d", ["a", "b=c", " d"]),
        ("a,", ["a", ""]),
        ('"a,b",c', ["a,b", "c"]),
        ('type=tar,"dest=a ""b"", c"', ["type=tar", 'dest=a "b", c']),
        ('""', [""]),
        ('"""",x', ['"', "x"]),
        ("a,b\r\n", ["a", "b"]),
        ('"a\nb",c\nd\n', ["a\nb", "c\nd"]),
    ],
)
def test_members_are_separated_by_commas_outside_of_double_quotes(text: str, fields: list[str]) -> None:
    assert split_fields(text) == fields
    assert split_fields(join_fields(fields)) == fields or fields == [""]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('"', "character 1 has no end"),
        ('a,"b""', "character 3 has no end"),
        ('"a"b', "expected a comma after the double quote that is character 3"),
        ('a,b"c"', "character 4 is within a member: put the whole member in double quotes"),
        ('a, "b"', "character 4 is within a member"),
    ],
)
def test_a_double_quote_that_is_out_of_place_is_an_error_as_in_go(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        split_fields(text)


def test_a_text_of_any_length_is_read_in_time_that_grows_with_it() -> None:
    assert len(split_fields('"",' * 200_000)) == 200_001
    with pytest.raises(ValueError, match="has no end"):
        split_fields('"' + '""' * 500_000)
