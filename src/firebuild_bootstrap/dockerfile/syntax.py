"""Text to instructions: keyword, flags, operands and heredocs, each with its line."""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass
from typing import Final

from e2b_dockerfile_utils import (
    DockerfileHeredoc,
    DockerfileInstruction,
    DockerfileSyntaxError,
    parse_dockerfile_ast,
)

from firebuild_bootstrap.dockerfile.model import Diagnostic, DockerfileSource
from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError, Location

KEYWORDS: Final = (
    *(
        "ADD",
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "FROM",
        "HEALTHCHECK",
        "LABEL",
        "MAINTAINER",
    ),
    *("ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"),
)
_SHOWN_CHARACTERS: Final = 160
_WHITE_SPACE: Final = re.compile(r"[^\S\n]+")
_PARSER_PREFIX: Final = re.compile(r"Dockerfile parse error(?: on line \d+)?: ")
_UNKNOWN: Final = re.compile(r"unknown instruction: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        keyword: in upper case.
        text: the whole instruction on one line, without the bodies of heredocs.
        flags: the `--name=value` words before the operands.
        args: the operands as the parser splits them for this keyword.
        json: the operands are in JSON form.
        heredocs: bodies, in the order of their markers.
        location: where it starts.
    """

    keyword: str
    text: str
    flags: tuple[str, ...]
    args: tuple[str, ...]
    json: bool
    heredocs: tuple[DockerfileHeredoc, ...]
    location: Location

    @property
    def operands(self) -> str:
        """What follows the keyword, for messages and the wire."""
        return self.text[len(self.keyword) :].strip()

    def error(self, message: str, *, hint: str | None = None) -> InputError:
        """Return an error that points at this instruction."""
        return InputError(message, hint=hint, location=self.location)


@dataclass(frozen=True)
class ParsedDockerfile:
    """The instructions of a Dockerfile, its escape character, and what the parser wonders about."""

    instructions: tuple[Instruction, ...]
    escape: str
    warnings: tuple[Diagnostic, ...]


def parse(source: DockerfileSource, at: Location | None = None) -> ParsedDockerfile:
    """Read a Dockerfile.

    Args:
        source: the text.
        at: report everything there instead of at the text's own lines (for ONBUILD triggers).

    Raises:
        InputError: the text is malformed, has an unknown instruction, or none at all.
    """
    lines = source.text.removeprefix("\ufeff").split("\n")
    directives = _directives(lines)
    try:
        tree = parse_dockerfile_ast("\n".join((*directives, *lines[len(directives) :])))
    except DockerfileSyntaxError as error:
        raise _syntax_error(error, at or Location(source.name, error.line or 0)) from error
    except RecursionError as error:
        nested = next((number for number, line in enumerate(lines, 1) if line.count("[") > 99), 0)
        raise InputError(
            "an instruction is nested too deeply", location=at or Location(source.name, nested)
        ) from error
    if not tree.instructions:
        raise InputError(
            "the Dockerfile has no instructions", hint="begin with FROM", location=at or Location(source.name)
        )
    instructions = tuple(
        _instruction(node, tree.escape_token, lines, at or Location(source.name, node.start_line))
        for node in tree.instructions
    )
    warnings = tuple(
        Diagnostic(at or Location(source.name, warning.line), "an empty line in a continued instruction")
        for warning in tree.warnings
    )
    return ParsedDockerfile(instructions, tree.escape_token, warnings)


def _directives(lines: list[str]) -> list[str]:
    """Return the comments at the top, where directives can be, with white space made short.

    The parser's expression for directives takes quadratic time for long runs of it.
    """
    comments = itertools.takewhile(lambda line: line.lstrip().startswith("#"), lines)
    return [_WHITE_SPACE.sub(" ", line) for line in comments]


def _instruction(
    node: DockerfileInstruction, escape: str, lines: list[str], location: Location
) -> Instruction:
    first_line = lines[node.start_line - 1].strip().removesuffix(escape)
    instruction = Instruction(
        keyword=node.name,
        text=_shown(node.original.strip(), first_line, elided=bool(node.heredocs)),
        flags=tuple(node.flags),
        args=tuple(node.args),
        json=node.json,
        heredocs=tuple(node.heredocs),
        location=location,
    )
    texts = (*instruction.flags, *instruction.args, *(heredoc.content for heredoc in instruction.heredocs))
    for text in texts:
        if UNUSABLE_TEXT.search(text):
            raise instruction.error(f"{node.name} contains a NUL or a character that is no Unicode text")
    return instruction


def short(text: str) -> str:
    """Return `text` as a message shows it: what is longer than two lines of a terminal is cut."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _shown(text: str, first_line: str, *, elided: bool) -> str:
    if len(text) > _SHOWN_CHARACTERS:
        text, elided = first_line[:_SHOWN_CHARACTERS], True
    return f"{text.rstrip()} …" if elided else text


def _syntax_error(error: DockerfileSyntaxError, location: Location) -> InputError:
    message = _PARSER_PREFIX.sub("", str(error), count=1)
    hint = None
    if unknown := _UNKNOWN.fullmatch(message):
        close = difflib.get_close_matches(unknown[1].upper()[:_SHOWN_CHARACTERS], KEYWORDS, n=1)
        hint = (
            f"did you mean {close[0]}?"
            if close
            else "a line that continues the one before needs a \\ at its end"
        )
    elif message == "unterminated heredoc":
        hint = "its end marker has to stand alone on a line, as in the line that begins it"
    return InputError(short(message), hint=hint, location=location)
