"""The blocks of code in a page, what the page says of each, and a shell that runs them.

A comment right before a block says what it is; one with `blocks:` speaks for all of its page that have none:

    <!-- run -->                      commands that the page's test runs; a fence `console` needs no comment
    <!-- output -->                   what a program printed, or a file
    <!-- synopsis -->                 the form of commands, for people to fill in
    <!-- tested: tests/FILE -->       that test runs it, or compares it with the code
    <!-- not run: WHY -->             commands that need what tests do not have
    <!-- file: NAME -->               the block is written to this file, for the commands after it
    <!-- before: COMMANDS -->         a comment alone: commands that the page does not show
    <!-- needs: COMPONENT, ... -->    what the page's test needs of the machine

In a block `console` the lines after `$ ` are commands, and all others what they print on standard output and
standard error. A command fails where its output has a line that begins with `error:`, and succeeds otherwise.
`…` stands for any text, alone on a line for any lines. Build ids, times and sizes count as equal.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
from markdown_it import MarkdownIt

from firebuild_bootstrap.cli.app import app
from support import BIN, REPO, unwarned

_COMMENT = re.compile(
    r"<!--\s*(run|output|synopsis|tested|not run|file|before|needs|blocks)\b:?\s*(.*?)\s*-->", re.DOTALL
)
_SHELLS = frozenset({"sh", "bash", "shell", "console"})
_ALIKE = [r"\bb[0-9a-f]{12}\b", r"\b\d+(?:\.\d+)? ?[KMG]iB\b", r"\b\d+\.\d ?s\b", r"\b[0-9a-f]{64}\b"]
# A slow machine tells what takes more than a second, and one without KVM that it is slow.
_SLOW = re.compile(
    r"^(?:[a-z][^:\n]*(?: …|: \d+\.\ds(?:, .*)?)|warning: the machine runs in software.*)\n", re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code, or a comment for the test alone.

    Args:
        page: the file, relative to the repository.
        line: where it begins, from 1.
        language: that of its fence; empty for an indented block.
        text: what is in it.
        kind: the first word of its comment; empty without one.
        detail: the rest of the comment.
    """

    page: str
    line: int
    language: str
    text: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_code(self) -> bool:
        """Whether it has commands, or what a program printed; other languages speak for themselves."""
        return self.kind not in {"before", "file"} and self.language in {*_SHELLS, ""}

    def firebuild(self) -> Iterator[list[str]]:
        """The words of each command of firebuild in it, in a job of a CI system as well."""
        for line in self.text.replace("\\\n", " ").splitlines():
            # Neither what is left out, nor what a reader fills in, nor forms of commands.
            if re.search(r"…|\$\{|\[", line):
                continue
            for found in re.finditer(r"(?:^|[;&|(`] ?|\$ |[A-Z_]+=\S+ |- )firebuild (?=\S)", line.strip()):
                lexer = shlex.shlex(
                    re.sub(r"\d>", ">", line.strip()[found.end() :]), posix=True, punctuation_chars=True
                )
                lexer.whitespace_split = True
                with suppress(ValueError):  # a line of a here-document
                    words = list(itertools.takewhile(lambda word: not set(word) <= set("();<>|&"), lexer))
                    yield words


def parse(words: list[str]) -> None:
    """Read a command as `firebuild` does; nothing of it is done."""
    command: click.Command = app
    context = click.Context(app, info_name="firebuild")
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(context, words)
        assert found is not None
        if not isinstance(found, click.Group):
            found.make_context(found.name, words, parent=context)
            return
        command, context = found, click.Context(found, info_name=found.name, parent=context)


def transcript(text: str) -> Iterator[tuple[str, str]]:
    """Split what a terminal showed into commands and what each printed."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        match = re.match(r"((?:.*\\\n)*.*)\n?", part)
        assert match is not None
        yield match[1], part[match.end() :]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Find the blocks of a page, and the comments that stand alone."""
    found: list[Block] = []
    waiting, all_others = ("", ""), ("", "")
    for token in MarkdownIt().parse((REPO / page).read_text("utf-8")):
        line = (token.map or [0])[0] + 1
        if token.type == "html_block":
            for kind, detail in _COMMENT.findall(token.content):
                if kind == "before":
                    found.append(Block(page, line, "sh", detail, kind, ""))
                elif kind == "blocks":
                    word = re.match(r"(run|output|synopsis|tested|not run)\b:?\s*(.*)", detail, re.DOTALL)
                    assert word is not None, f"{page}:{line}"
                    all_others = (word[1], word[2])
                elif kind != "needs":
                    waiting = (kind, detail)
            continue
        if token.type in {"fence", "code_block"}:
            language = (token.info.split() or [""])[0]
            kind, detail = waiting
            if not kind:
                kind, detail = all_others
            if not kind and language == "console":
                kind = "run"
            found.append(Block(page, line, language, token.content, kind, detail))
        if token.level == 0:
            waiting = ("", "")
    return tuple(found)


def needs(page: str) -> list[str]:
    """Name what the test of a page needs of the machine."""
    comments = _COMMENT.findall((REPO / page).read_text("utf-8"))
    return [name.strip() for kind, detail in comments if kind == "needs" for name in detail.split(",")]


class Shell:
    """Runs the commands of one page in a directory with the examples, and a home of its own.

    Args:
        folder: where.
        environ: the environment; settings of firebuild in it are left out, and so is measuring coverage.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.home, self.work, self._state = folder / "home", folder / "work", folder / "state"
        for one in (self.home, self.work):
            one.mkdir()
        (self.work / "examples").symlink_to(REPO / "examples")
        own = {
            name: value
            for name, value in environ.items()
            if not name.startswith(("FIREBUILD_", "XDG_", "COV"))
        }
        self._environ = {
            **own,
            "HOME": str(self.home),
            "PATH": f"{BIN}:{environ['PATH']}",
            "TERM": "dumb",
        } | {"COLUMNS": "110"}
        self._state.write_text(f"cd {self.work}\n")

    def __call__(self, command: str) -> tuple[int, str]:
        """Run a command; variables and the directory stay for the next one.

        Returns:
            its exit status, and what it printed.
        """
        script = f'. "$0"\n{command}\nended=$?\n{{ export -p; echo "cd \'$PWD\'"; }} > "$0"\nexit $ended\n'
        done = subprocess.run(
            ["bash", "-c", script, self._state],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )
        return done.returncode, unwarned(done.stdout).replace(str(self.home), "~")


def compare(where: str, command: str, expected: str, status: int, printed: str) -> str:
    """Say how a command did something else than a page shows; empty if it did not."""
    fails = re.search(r"^error:", expected, re.MULTILINE) is not None
    if fails == (status == 0):
        return f"{where}: {command}\nended with status {status} and printed\n{printed}"
    pattern = ""
    for line in expected.strip("\n").split("\n"):
        pattern += "(?s:.*)" if line == "…" else "\n" * bool(pattern) + re.escape(line).replace("…", ".*")
    for alike in _ALIKE:
        for shown in set(re.findall(alike, expected)):
            pattern = pattern.replace(re.escape(shown), alike)
    if re.fullmatch(pattern, printed.strip("\n")) or re.fullmatch(
        pattern, _SLOW.sub("", printed).strip("\n")
    ):
        return ""
    return f"{where}: {command}\nprinted\n{printed}\ninstead of\n{expected}"
