"""Untrusted text on a terminal, and the walk over chains of exceptions."""

from __future__ import annotations

import pytest

from firebuild_pki.display import block, counted, escaped, one_line
from firebuild_pki.errors import causes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ünïcode", "plain text, ünïcode"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("first\nsecond\r\n  third\t.", "first second third ."),
        ("c1 \x9b2J", r"c1 \x9b2J"),
        ("evil\u202egpj.exe", r"evil\u202egpj.exe"),
        ("line\u2028separator", "line separator"),
        (b"latin \xe9".decode("utf-8", "surrogateescape"), r"latin \xe9"),
        ("lone \ud800", r"lone \ud800"),
        ("tag \U000e0001", r"tag \U000e0001"),
        ("bell\a nul\0", r"bell\x07 nul\x00"),
    ],
)
def test_one_line_shows_what_could_move_a_cursor(text: str, shown: str) -> None:
    assert one_line(text) == shown
    assert one_line(text).isprintable()


def test_a_long_line_is_cut_and_says_how_long_it_was() -> None:
    assert one_line("x" * 1000, limit=10) == "x" * 10 + "… (1000 characters in all)"


@pytest.mark.parametrize("flood", ["x", " ", "\x1b", "\n"])
def test_a_flood_becomes_a_short_line(flood: str) -> None:
    assert len(one_line(flood * 10_000_000)) < 600
    assert len(block(flood * 10_000_000)) < 20_000


def test_a_block_keeps_lines_and_indents_only() -> None:
    assert block("a:\r\n\tb\x1b[2J\n  c\rd") == "a:\n        b\\x1b[2J\n  c\\rd"


def test_escapes_name_the_usual_controls() -> None:
    assert escaped("a\tb\nc\rd") == r"a\tb\nc\rd"


def test_a_circle_of_causes_is_walked_once() -> None:
    first, second = ValueError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    first.__cause__ = first
    assert list(causes(first)) == [first]
    assert list(causes(None)) == []


def test_an_endless_chain_of_causes_is_given_up() -> None:
    def endless(_: BaseException) -> list[object]:
        return ["no exception", Exception("another")]

    assert len(list(causes(Exception("first"), endless))) == 100


def test_what_is_counted_is_one_or_several() -> None:
    found = [counted(number, "byte") for number in (0, 1, 2, -1, 1.0, 1.5, 60.0, 1_000_000)]
    assert found == [
        *("0 bytes", "1 byte", "2 bytes", "-1 bytes", "1 byte", "1.5 bytes", "60 bytes", "1000000 bytes")
    ]
