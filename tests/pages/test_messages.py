"""Every message of an error is on its page, and asserted by a test."""

from __future__ import annotations

import ast
import re
import runpy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import REPO

MODULE = runpy.run_path(str(REPO / "scripts/error_messages.py"))
# What one program of firebuild says to another that does not keep to the protocol: no user can cause it.
OF_PROGRAMS = {"ProtocolError", "WireError"}
# No test has the words of these; the list gets shorter only.
NOT_YET = [
    "can't join the build of the server … as …: …",
    "could not …: its worker ended with status …",
    "expected a size in bytes, found …",
    "expected system/architecture or system/architecture/variant",
    "expected the extended key usage … in the … certificate, but the role … gave: …",
    "finished certificates sign nothing",
    'it was issued by "…"',
    "the guest sent a message of …; … are allowed",
    "the guest sent a … of …; … are allowed",
    "the guest's vminit is too old for this Dockerfile: step … is longer than the … bytes that it can take",
    "the guest's vminit is too old for this Dockerfile: step … runs …, whose name contains '='",
    "the guest's vminit is too old for this Dockerfile: …is longer than the … bytes that it can take",
    "the guest's vminit is too old for this Dockerfile: …runs …, whose name contains '='",
    "the image … was removed while it was stored",
    "the manifest of … is an index",
    "the server broke off the files of …: …",
    "the server did not answer … pings in a row",
    "there is no interface … after … seconds…",
    "… can't be decompressed: …",
    "… could not be compressed: …",
    "… is not an index",
    "…: the blob … of … was cut off after … of …",
    "…: …: a login at …: it answered … …",
    "…: …: a login at …: it answered … …; it asks to wait for …",
]
_MOST = 6  # words of one run

Run = tuple[str, ...]


def fragments(text: str) -> tuple[Run, ...]:
    """Split a message into the words between what differs."""
    found = (tuple(re.findall(r"\w+(?:'\w+)?", part)) for part in re.split(r"…|\.[*+]|[{}\n]", text))
    return tuple(filter(None, found))


def runs(words: Run, least: int = 1) -> Iterator[Run]:
    for first in range(len(words)):
        for last in range(first + least, min(len(words), first + _MOST) + 1):
            yield words[first:last]


def literals(text: str) -> Iterator[str]:
    """The strings in a module, with `…` for what differs; those that a regular expression is made of, too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = (one.value if isinstance(one, ast.Constant) else "…" for one in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"\\(.)", r"\1", node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bytes):
            yield node.value.decode("latin-1")


def asserted(texts: set[str], tests: set[str]) -> set[str]:
    """Find the messages that are asserted: by words that no other message has, or by all their fragments.

    Args:
        texts: the messages.
        tests: the strings of the tests.
    """
    of: dict[Run, set[tuple[Run, ...]]] = defaultdict(set)
    for text in texts:
        for words in fragments(text):
            for run in runs(words, 2):
                of[run].add(fragments(text))
    seen = {run for text in tests for words in fragments(text) for run in runs(words, 2)}

    def whole(words: Run) -> bool:
        return words in seen or any(run in seen for run in runs(words, 4))

    found = set()
    for text in texts:
        parts = [words for words in fragments(text) if len(words) > 1]
        own = (run for words in parts for run in runs(words, 2) if len(of[run]) == 1)
        if any(run in seen for run in own) or (parts and all(map(whole, parts))):
            found.add(text)
    return found


def strings_of_tests() -> set[str]:
    files = {*REPO.glob("tests/**/*.py"), *REPO.glob("plugins/*/tests/**/*.py")} - {Path(__file__)}
    found = {text for file in files for text in literals(file.read_text("utf-8"))}
    pages = (page for page in REPO.glob("docs/**/*.md") if page.parent.name != "reference")
    return found.union(*(re.findall(r"(?s)```console\n(.*?)```", page.read_text("utf-8")) for page in pages))


def test_every_message_of_the_source_is_asserted_by_a_test() -> None:
    found = MODULE["messages"](REPO)
    texts = {one.text for one in found if one.error not in OF_PROGRAMS}
    assert len(texts) > 1000
    assert sorted(texts - asserted(texts, strings_of_tests())) == NOT_YET


def test_a_message_that_no_test_asserts_is_found() -> None:
    texts = {"the kernel … can't be read: …", "the key … can't be read: …"}
    assert asserted(texts, {"the kernel /x can't be read"}) == {"the kernel … can't be read: …"}
    assert asserted(texts, {"can't be read: gone"}) == set()
    assert asserted(texts, set()) == set()


SOURCE = """
from hints import AGAIN as RETRY

class Wrong(Exception): ...
class Bad(Wrong): ...

LIMIT = "the limit is reached"

def refusal(why, hint=None) -> Bad:
    return Bad(f"{LIMIT} at {why}", hint=hint)

class Reader:
    def _wrong(self, what: str) -> Exception:
        return refusal(f"the line of {what}", "write it anew")

    def read(self, line):
        if not line:
            raise self._wrong("a first name")
        reason = "too long for anybody" if len(line) > 9 else f"{line} is short"
        raise Wrong(f"no use: {reason}", hint=RETRY)
        raise KeyError("not one of ours")

def problem(key) -> str | None:
    return "the key is weak" if key else None
"""


def test_messages_are_followed_through_functions_names_and_alternatives(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/one.py").write_text(SOURCE)
    (tmp_path / "src/hints").mkdir()
    (tmp_path / "src/hints/__init__.py").write_text("from hints.texts import AGAIN")
    (tmp_path / "src/hints/texts.py").write_text('AGAIN = "try it again"')
    found: list[Any] = MODULE["messages"](tmp_path)
    assert {(one.text, one.hint, one.error) for one in found} == {
        ("the limit is reached at the line of a first name", "write it anew", "Bad"),
        ("no use: too long for anybody", "try it again", "Wrong"),
        ("no use: … is short", "try it again", "Wrong"),
        ("the key is weak", "", ""),
    }


@pytest.mark.parametrize(
    ("text", "printed", "fits"),
    [("the key … is …", "error: the key a.pem is weak", True), ("the key …", "the kernel", False)],
)
def test_a_message_is_found_in_what_was_printed(text: str, printed: str, fits: bool) -> None:
    assert bool(MODULE["pattern"](text).search(printed)) is fits
