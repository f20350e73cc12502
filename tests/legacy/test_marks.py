"""Marks among output, however it is cut."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from firebuild_bootstrap.legacy.old_guest import Mark, MarkReader

NONCE = "0123456789abcdef"
TEXT = f"one\n\x01{NONCE}:B:3:\x02\ntwo\x01\x02 \x01{NONCE}:E:3:\x02three\x01{NONCE}:X:3:why\nnot\x02"


def read(pieces: list[str]) -> tuple[str, list[tuple[str, int, str]]]:
    reader = MarkReader(NONCE)
    output, marks = "", []
    for piece in pieces:
        for part in reader.feed(piece):
            if isinstance(part, Mark):
                marks.append((part.kind, part.step, part.value))
            else:
                output += part
    return output + reader.rest(), marks


@given(st.sets(st.integers(1, len(TEXT) - 1)))
def test_marks_are_found_wherever_the_output_is_cut(cuts: set[int]) -> None:
    ends = [0, *sorted(cuts), len(TEXT)]
    output, marks = read([TEXT[begin:end] for begin, end in itertools.pairwise(ends)])
    assert marks == [("B", 3, ""), ("E", 3, ""), ("X", 3, "why\nnot")]
    # The line feed of a mark belongs to it only where it comes along.
    assert output.replace("\n", "") == "onetwo\x01\x02 three"


def test_what_only_begins_like_a_mark_is_output_in_the_end() -> None:
    assert read(["a\x01", NONCE[:4]]) == (f"a\x01{NONCE[:4]}", [])
    assert read([f"a\x01{NONCE}:E:1:", "b"]) == (f"a\x01{NONCE}:E:1:b", [])
    assert read(["\x01other:B:1:\x02\n"]) == ("\x01other:B:1:\x02\n", [])
