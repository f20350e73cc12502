"""Instructions that the guest executes: RUN, COPY, ADD and WORKDIR become commands on the wire.

https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from typing import Final

from e2b_dockerfile_utils import DockerfileHeredoc, chomp_heredoc_content, parse_heredoc

from firebuild_bootstrap.context.download import Checksum, file_name, redacted
from firebuild_bootstrap.context.entries import Resource
from firebuild_bootstrap.context.sources import InlineSource, LocalSource, RemoteSource, Source
from firebuild_bootstrap.dockerfile.flags import read_flags
from firebuild_bootstrap.dockerfile.metadata import command_line, one_word
from firebuild_bootstrap.dockerfile.stage import Stage
from firebuild_bootstrap.dockerfile.syntax import Instruction, short
from firebuild_bootstrap.wire import AnyCommand, CopyCommand, RunCommand, WorkdirCommand

Command = tuple[AnyCommand, Resource | None]

_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_GIT: Final = re.compile(r"git@|(git|ssh|git\+[a-z]+)://|https?://[^#?]+\.git/?(#|$|\?)", re.IGNORECASE)
_OCTAL: Final = re.compile(r"0*[0-7]{1,4}")
_SYMBOLIC: Final = re.compile(r"[ugoa]*([-+=]([rwxXst]*|[ugo]))+(,[ugoa]*([-+=]([rwxXst]*|[ugo]))+)*")
_OWNER: Final = re.compile(r"[^:\s]*(:[^:\s]*)?")


def _original(instruction: Instruction) -> str:
    # Guests dispatch by the keyword in upper case.
    return f"{instruction.keyword} {instruction.operands}"


def _user(stage: Stage) -> str:
    return stage.config.user or "0:0"


def run(stage: Stage, instruction: Instruction, number: int) -> Command:
    """Turn a RUN into a command; its words are left to the shell.

    Raises:
        InputError: there is nothing to run, or a flag is not supported.
    """
    read_flags(instruction, stage.expander(instruction).word)
    argv = command_line(stage, instruction)
    if not argv:
        raise instruction.error("RUN: expected a command, found an empty list")
    script = None
    if instruction.heredocs:
        text = _shell_text(instruction)
        argv = (*stage.shell, text)
        script = text if _is_only_heredoc(instruction) and text.startswith("#!") else None
    env, args = stage.variables.environment()
    command = RunCommand(
        step=number,
        original=_original(instruction),
        workdir=stage.config.workdir,
        user=_user(stage),
        argv=argv,
        env=env,
        args=args,
        script=script,
    )
    return command, None


def _is_only_heredoc(instruction: Instruction) -> bool:
    return parse_heredoc(instruction.args[0]) is not None


def _shell_text(instruction: Instruction) -> str:
    # No shell understands CRLF, and nobody means it in a Dockerfile that was saved with it.
    if _is_only_heredoc(instruction):
        return _body(instruction.heredocs[0]).replace("\r\n", "\n")
    # The heredocs belong to a command of the line: the shell reads them as they were written.
    bodies = (f"{heredoc.content}{heredoc.name}\n" for heredoc in instruction.heredocs)
    return instruction.args[0] + "\n" + "".join(bodies).replace("\r\n", "\n")


def _body(heredoc: DockerfileHeredoc) -> str:
    return chomp_heredoc_content(heredoc.content) if heredoc.chomp else heredoc.content


def workdir(stage: Stage, instruction: Instruction, number: int) -> Command:
    """Turn a WORKDIR into a command; relative ones continue the one before.

    Raises:
        InputError: there is no path.
    """
    path = one_word(stage, instruction)
    if not path:
        stage.warn(instruction, f"WORKDIR {instruction.operands} expands to nothing and changes nothing")
    stage.change(workdir=_clean(stage.config.workdir, path))
    command = WorkdirCommand(
        step=number, original=_original(instruction), workdir=stage.config.workdir, user=_user(stage)
    )
    return command, None


def _clean(workdir: str, path: str) -> str:
    # Before any link is followed, as BuildKit does it: /a/../b is /b, wherever /a leads to.
    return "/" + posixpath.normpath(posixpath.join(workdir, path)).lstrip("/")


def copy(stage: Stage, instruction: Instruction, number: int) -> Command | None:
    """Turn a COPY or ADD into a command and what it sends; remote files are downloaded.

    Returns:
        None if all its sources are patterns that match nothing: then BuildKit copies nothing, and makes no
        destination either.

    Raises:
        InputError: operands or flags are wrong, or a source can't be found or downloaded.
    """
    expander = stage.expander(instruction)
    flags = read_flags(instruction, expander.word)
    if len(instruction.args) < 2:
        raise instruction.error(
            f"{instruction.keyword}: expected a source and a destination, "
            f"found {short(instruction.operands)!r}"
        )
    if not instruction.json and parse_heredoc(instruction.args[-1]):
        raise instruction.error(f"{instruction.keyword}: the destination can't be a heredoc")
    owner = _owner(stage, instruction, flags.get("chown"))
    mode = _mode(stage, instruction, flags.get("chmod"))
    *words, last = instruction.args
    target = expander.word(last) or "."
    is_directory = target.endswith("/") or posixpath.basename(target) in (".", "..")
    if ".." in target.split("/"):
        target = _clean(stage.config.workdir, target)
        target = posixpath.join(target, "") if is_directory else target
    sources = _sources(instruction, words, expander.word, expander.body, flags.get("checksum"))
    if not is_directory:
        _require_single(instruction, len(sources), target)
    elif nameless := next(
        (s.url for s in sources if isinstance(s, RemoteSource) and not file_name(s.url)), None
    ):
        raise instruction.error(
            f"ADD: {redacted(nameless)} has no file name", hint="name the file in the destination"
        )
    resource = stage.context.resource(
        sources,
        location=instruction.location,
        unpack=instruction.keyword == "ADD",
    )
    if not resource.groups:
        patterns = ", ".join(
            repr(short(source.text)) for source in sources if isinstance(source, LocalSource)
        )
        stage.warn(instruction, f"nothing in the build context matches {patterns}, so nothing is copied")
        return None
    if not is_directory:
        _require_single(instruction, len(resource.groups), target)
    command = CopyCommand(
        step=number,
        original=_original(instruction),
        workdir=stage.config.workdir,
        source=f"step-{number}",
        target=target,
        target_is_directory=is_directory,
        chown=owner,
        chmod=mode,
        keyword=instruction.keyword,
    )
    return command, resource


def _sources(
    instruction: Instruction,
    words: list[str],
    expand: Callable[[str], str],
    expand_body: Callable[[str], str],
    checksum: str | None,
) -> list[Source]:
    bodies = {heredoc.name: heredoc for heredoc in instruction.heredocs}
    sources: list[Source] = []
    for word in words:
        marker = parse_heredoc(word) if bodies else None
        if marker is not None and (heredoc := bodies.get(marker.name)):
            text = _body(heredoc)
            sources.append(InlineSource(heredoc.name, expand_body(text) if heredoc.expand else text))
        else:
            sources.append(_source(instruction, expand(word), checksum))
    if checksum is not None and not (len(sources) == 1 and isinstance(sources[0], RemoteSource)):
        raise instruction.error(
            "ADD --checksum needs exactly one source, and that a URL",
            hint="files of the build context need none",
        )
    return sources


def _source(instruction: Instruction, text: str, checksum: str | None) -> Source:
    url = _URL.match(text)
    if instruction.keyword == "COPY":
        if url:
            raise instruction.error(f"COPY can't download {redacted(text)}", hint="use ADD")
        return LocalSource(text)
    if _GIT.match(text):
        raise instruction.error(
            f"ADD from a git repository is not supported yet: {redacted(text)}",
            hint="clone it into the build context",
        )
    if not url:
        return LocalSource(text)
    if url[1].lower() not in ("http", "https"):
        raise instruction.error(f"ADD: expected http:// or https://, found {url[0]!r}")
    return RemoteSource(
        text, Checksum.parse(checksum, instruction.location) if checksum is not None else None
    )


def _require_single(instruction: Instruction, count: int, target: str) -> None:
    if count > 1:
        raise instruction.error(
            f"{instruction.keyword} of several sources needs a destination that ends in /, "
            f"found {short(target)!r}",
            hint=f"write {target}/",
        )


def _owner(stage: Stage, instruction: Instruction, text: str | None) -> str | None:
    if not text:
        _warn_of_empty(stage, instruction, "chown", text)
        return None
    if not _OWNER.fullmatch(text):
        raise instruction.error(
            f"--chown: expected user or user:group, by name or number, found {short(text)!r}"
        )
    # What is left out is what it would be without the colon: root, and the group of the user.
    user, _, group = text.partition(":")
    return f"{user or '0'}:{group}" if group else user or "0"


def _mode(stage: Stage, instruction: Instruction, text: str | None) -> str | None:
    if not text:
        _warn_of_empty(stage, instruction, "chmod", text)
        return None
    if _OCTAL.fullmatch(text):
        return text[-4:]
    if not _SYMBOLIC.fullmatch(text):
        raise instruction.error(
            f"--chmod: expected an octal mode up to 7777 or a symbolic one, found {short(text)!r}",
            hint="for example 0755 or u=rwX,go=rX",
        )
    return text


def _warn_of_empty(stage: Stage, instruction: Instruction, flag: str, text: str | None) -> None:
    if text is not None:
        stage.warn(instruction, f"{instruction.keyword} --{flag} is empty, which is as if it were not there")


HANDLERS: Final[dict[str, Callable[[Stage, Instruction, int], Command | None]]] = {
    "ADD": copy,
    "COPY": copy,
    "RUN": run,
    "WORKDIR": workdir,
}
