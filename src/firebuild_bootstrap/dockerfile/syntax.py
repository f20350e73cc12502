"""Text to instructions: keyword, flags, operands and heredocs, each with its line."""

from __future__ import annotations

import codecs
import difflib
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import Final

from e2b_dockerfile_utils import (
    DockerfileAst,
    DockerfileHeredoc,
    DockerfileInstruction,
    DockerfileSyntaxError,
    parse_dockerfile_ast,
)

from firebuild_bootstrap.dockerfile.graph import Diagnostic
from firebuild_bootstrap.errors import UNUSABLE_TEXT, InputError, Location
from firebuild_pki.values import dataclass

KEYWORDS: Final = (
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "MAINTAINER",
    "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
)  # fmt: skip
MOST_TEXT: Final = 16 << 20
"""Bytes of a Dockerfile, and of an ignore file; what is sent to BuildKit may not be larger either (gRPC)."""
# The parser joins the lines of an instruction one by one: lines times characters.
_MOST_JOINED: Final = 10**10
_CONTINUES: Final = ("\\", "`")
_SHOWN_CHARACTERS: Final = 160
_WHITE_SPACE: Final = re.compile(r"[^\S\n]+")
_ONBUILD: Final = re.compile(r"^\s*ONBUILD\s*", re.IGNORECASE)
_ONBUILD_HEREDOC: Final = re.compile(r"\s*ONBUILD\s+(?:RUN|COPY|ADD)\s.*<<", re.IGNORECASE)
DIRECTIVE: Final = re.compile(r"\s*#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(\S.*?)\s*")
_PARSER_PREFIX: Final = re.compile(r"Dockerfile parse error(?: on line \d+)?: ")
_UNKNOWN: Final = re.compile(r"unknown instruction: (.*)", re.DOTALL)


def _instead(missing: Path) -> str:
    other = missing.parent / "Containerfile"  # as buildah and podman look for it
    return f": {other} is there" if missing.name == "Dockerfile" and os.path.lexists(other) else ""


@dataclass(frozen=True)
class DockerfileSource:
    """A Dockerfile's text, and what to call it in messages."""

    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> DockerfileSource:
        """Read a Dockerfile.

        Raises:
            InputError: it can't be read, is too large or is not UTF-8.
        """
        try:
            # Bytes, because reading as text would turn CRLF into LF inside heredocs.
            with open(path, "rb") as file:
                content = file.read(MOST_TEXT + 1)
        except OSError as error:
            raise InputError(
                f"the Dockerfile can't be read: {error.strerror}",
                hint="let this user read it"
                if isinstance(error, PermissionError)
                else "name it with --dockerfile" + _instead(path),
                location=Location(str(path)),
            ) from error
        return cls.decode(str(path), content)

    @classmethod
    def decode(cls, name: str, content: bytes) -> DockerfileSource:
        """Make a Dockerfile of what was read.

        Raises:
            InputError: it is too large or not UTF-8.
        """
        if len(content) > MOST_TEXT:
            raise InputError(
                f"the Dockerfile is larger than {MOST_TEXT >> 20} MiB",
                hint="put large texts into files that COPY sends",
                location=Location(name),
            )
        try:
            return cls(name, content.decode("utf-8"))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            # What `>` of Windows PowerShell writes.
            encoding = (
                "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
            )
            raise InputError(
                "the Dockerfile is not UTF-8 text",
                hint=f"convert it, for example with `iconv -f {encoding} -t utf-8`",
                location=Location(name, line),
            ) from error


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
        comments: those above it, up to the instruction before, without `#`.
    """

    keyword: str
    text: str
    flags: tuple[str, ...]
    args: tuple[str, ...]
    json: bool
    heredocs: tuple[DockerfileHeredoc, ...]
    location: Location
    comments: tuple[str, ...] = ()

    @property
    def operands(self) -> str:
        """What follows the keyword, for messages and the wire."""
        return self.text[len(self.keyword) :].strip()

    def error(self, message: str, *, hint: str | None = None) -> InputError:
        """Return an error that points at this instruction."""
        return InputError(message, hint=hint, location=self.location)


@dataclass(frozen=True)
class ParsedDockerfile:
    """The instructions of a Dockerfile.

    Args:
        instructions: in their order.
        escape: the escape character.
        head: the comments at the top, where directives can be.
        warnings: of the parser.
    """

    instructions: tuple[Instruction, ...]
    escape: str
    head: tuple[str, ...]
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
    _require_joinable(lines, source.name, at)
    try:
        tree, bare = _parse(lines)
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
    for node in tree.instructions:
        if node.start_line in bare:
            _put_behind_onbuild(node)
    directives = sum(1 for _ in itertools.takewhile(DIRECTIVE.fullmatch, lines))
    ends = (0, *(node.end_line for node in tree.instructions))
    instructions = tuple(
        _instruction(
            node,
            tree.escape_token,
            lines,
            at or Location(source.name, node.start_line),
            _comments(lines[max(end, directives) : node.start_line - 1]),
        )
        for node, end in zip(tree.instructions, ends, strict=False)
    )
    warnings = tuple(
        Diagnostic(
            at or Location(source.name, warning.line),
            "an empty line in a continued instruction",
            "NoEmptyContinuation",
        )
        for warning in tree.warnings
    )
    return ParsedDockerfile(instructions, tree.escape_token, tuple(_directives(lines)), warnings)


def _require_joinable(lines: Iterable[str], name: str, at: Location | None) -> None:
    """Refuse an instruction of so many lines that joining them would take minutes."""
    first = count = characters = 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.endswith(_CONTINUES):
            first = first if count else number
            count, characters = count + 1, characters + len(line)
            if count * characters > _MOST_JOINED:
                raise InputError(
                    f"an instruction is continued over more than {count - 1} lines",
                    hint="put a long script into a heredoc, or into a file that COPY sends",
                    location=at or Location(name, first),
                )
        elif text and not text.startswith("#"):  # those are left out
            count = characters = 0


def _comments(lines: Iterable[str]) -> tuple[str, ...]:
    stripped = (line.strip() for line in lines)
    return tuple(line[1:].strip() for line in stripped if line.startswith("#"))


def _parse(lines: list[str]) -> tuple[DockerfileAst, set[int]]:
    """Parse lines; the numbers are those of ONBUILDs that were parsed as what they hold.

    The parser knows no heredocs in ONBUILD. So an ONBUILD that seems to have one is parsed without its
    keyword, except where that turns out not to be an instruction but a line of something else.
    """
    directives = _directives(lines)
    lines = [*directives, *lines[len(directives) :]]
    bare = {number for number, line in enumerate(lines, 1) if _ONBUILD_HEREDOC.match(line)}
    if bare:
        without = [_ONBUILD.sub("", line) if number in bare else line for number, line in enumerate(lines, 1)]
        tree = parse_dockerfile_ast("\n".join(without))
        wrong = bare - {node.start_line for node in tree.instructions if node.heredocs}
        if not wrong:
            return tree, bare
        bare -= wrong
        lines = [_ONBUILD.sub("", line) if number in bare else line for number, line in enumerate(lines, 1)]
    return parse_dockerfile_ast("\n".join(lines)), bare


def _put_behind_onbuild(node: DockerfileInstruction) -> None:
    node.name, node.original, node.flags, node.json = "ONBUILD", f"ONBUILD {node.original}", [], False


def _directives(lines: list[str]) -> list[str]:
    """Return the comments at the top, where directives can be, with white space made short.

    The parser's expression for directives takes quadratic time for long runs of it.
    """
    comments = itertools.takewhile(lambda line: line.lstrip().startswith("#"), lines)
    return [_WHITE_SPACE.sub(" ", line) for line in comments]


def _instruction(
    node: DockerfileInstruction, escape: str, lines: list[str], location: Location, comments: tuple[str, ...]
) -> Instruction:
    first_line = lines[node.start_line - 1].strip().removesuffix(escape)
    instruction = Instruction(
        keyword=node.name,
        text=_shown(node.original.strip(), first_line, elided=bool(node.heredocs)),
        flags=tuple(node.flags),
        args=_trigger(node) if node.name == "ONBUILD" else tuple(node.args),
        json=node.json,
        heredocs=tuple(node.heredocs),
        location=location,
        comments=comments,
    )
    texts = (*instruction.flags, *instruction.args, *(heredoc.content for heredoc in instruction.heredocs))
    for text in texts:
        if UNUSABLE_TEXT.search(text):
            raise instruction.error(f"{node.name} contains a NUL or a character that is not Unicode text")
    return instruction


def _trigger(node: DockerfileInstruction) -> tuple[str, ...]:
    """Return what an ONBUILD adds to the image's configuration."""
    text = _ONBUILD.sub("", node.original, count=1)
    return (text + "".join(f"\n{heredoc.content}{heredoc.name}" for heredoc in node.heredocs),)


def guess(text: str, known: Iterable[str]) -> str | None:
    """Return the hint that names what a misspelt word was meant to be, if one of `known` is near enough."""
    close = difflib.get_close_matches(text[:_SHOWN_CHARACTERS], list(known), n=1)
    return f"did you mean {close[0]}?" if close else None


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
        hint = guess(unknown[1].upper(), KEYWORDS)
        hint = hint or "a line that continues the one before needs a \\ at its end"
    elif message == "unterminated heredoc":
        hint = "its end marker has to stand alone on a line, as in the line that begins it"
    elif message.endswith((" must have two arguments", "of the form: name=value")):
        hint = 'each is name=value; a value with spaces stands in quotes, as in name="a b"'
    return InputError(short(message), hint=hint, location=location)


class _Kind(Enum):
    VALUE = "value"
    VALUES = "values"  # may be repeated
    SWITCH = "switch"


_COPYING: Final = {
    "chown": _Kind.VALUE,
    "chmod": _Kind.VALUE,
    "link": _Kind.SWITCH,
    "exclude": _Kind.VALUES,
}
_FLAGS: Final[dict[str, dict[str, _Kind]]] = {
    "FROM": {"platform": _Kind.VALUE},
    "RUN": {
        "mount": _Kind.VALUES,
        "network": _Kind.VALUE,
        "security": _Kind.VALUE,
        "device": _Kind.VALUES,
    },
    "COPY": _COPYING | {"from": _Kind.VALUE, "parents": _Kind.SWITCH},
    "ADD": _COPYING | {"checksum": _Kind.VALUE, "keep-git-dir": _Kind.SWITCH, "unpack": _Kind.SWITCH},
    "HEALTHCHECK": dict.fromkeys(
        ("interval", "timeout", "start-period", "start-interval", "retries"), _Kind.VALUE
    ),
}


@dataclass(frozen=False)
class Flags:
    """The flags of one instruction, as they are written.

    Args:
        values: of flags that take one.
        lists: of flags that may be repeated, in their order.
        switches: those that are given, on or off.
    """

    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, list[str]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)


def read_flags(instruction: Instruction) -> Flags:
    """Return an instruction's flags; variables in them are not expanded.

    Raises:
        InputError: a flag is unknown, given twice, lacks its value, or has one that it can't have.
    """
    known = _FLAGS.get(instruction.keyword, {})
    flags = Flags()
    for flag in instruction.flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        kind = known.get(name)
        if kind is None:
            raise _unknown(instruction, name, known)
        title = f"{instruction.keyword} --{name}"
        if name in flags.values or name in flags.switches:
            raise instruction.error(f"{title} is given twice")
        if kind is _Kind.SWITCH:
            if equals and value.lower() not in ("true", "false"):
                raise instruction.error(f"{title}: expected true or false, found {short(value)!r}")
            flags.switches[name] = value.lower() != "false"
        elif not equals:
            raise instruction.error(f"{title}: expected a value: --{name}=…")
        elif kind is _Kind.VALUES:
            flags.lists.setdefault(name, []).append(value)
        else:
            flags.values[name] = value
    return flags


def _unknown(instruction: Instruction, name: str, known: dict[str, _Kind]) -> Exception:
    if hint := guess(f"--{name}", [f"--{each}" for each in known]):
        pass
    elif known:
        hint = f"{instruction.keyword} knows " + ", ".join(f"--{each}" for each in known)
    else:
        hint = f"{instruction.keyword} has no flags"
    return instruction.error(f"unknown flag --{short(name)} of {instruction.keyword}", hint=hint)


def parse_assignments(values: Iterable[str], option: str) -> dict[str, str | None]:
    """Read the values of an option that takes NAME=VALUE; NAME alone gives None, and the last one wins.

    Args:
        values: as given by the user.
        option: what to call it in messages, for example `--build-arg`.

    Raises:
        InputError: there is no name before `=`. The value, which may be a secret, is not shown.
    """
    pairs: dict[str, str | None] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name.strip():
            raise InputError(f"{option}: expected NAME=VALUE, found no name before =")
        pairs[name] = value if equals else None
    return pairs
