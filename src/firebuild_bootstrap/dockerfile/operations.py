"""Instructions that do something to the files of a stage: RUN, COPY, ADD and WORKDIR become operations.

https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from e2b_dockerfile_utils import DockerfileHeredoc, chomp_heredoc_content, parse_heredoc

from firebuild_bootstrap.dockerfile.graph import (
    ContextRef,
    Copy,
    Download,
    Files,
    FileSet,
    GitTree,
    Heredoc,
    Operation,
    Run,
    TreeRef,
    Workdir,
)
from firebuild_bootstrap.dockerfile.metadata import command_line, one_word, require_ids
from firebuild_bootstrap.dockerfile.mounts import MountScope, check_run, read_mounts
from firebuild_bootstrap.dockerfile.remote import (
    check_digest,
    file_name,
    read_git,
    redacted,
    scheme,
)
from firebuild_bootstrap.dockerfile.stage import Expander, StageState
from firebuild_bootstrap.dockerfile.syntax import Flags, Instruction, read_flags, short
from firebuild_bootstrap.matching import BadPattern, IgnorePattern
from firebuild_bootstrap.wire import absolute

_OCTAL: Final = re.compile(r"0*[0-7]{1,4}")
_SYMBOLIC: Final = re.compile(r"[ugoa]*([-+=]([rwxXst]*|[ugo]))+(,[ugoa]*([-+=]([rwxXst]*|[ugo]))+)*")
_OWNER: Final = re.compile(r"[^:\s]*(:[^:\s]*)?")


def _user(stage: StageState) -> str:
    return stage.config.user or "0:0"


def run(stage: StageState, instruction: Instruction) -> Operation:
    """Turn a RUN into an operation; its words are left to the shell.

    Raises:
        InputError: there is nothing to run, or a flag is malformed or not supported.
    """
    flags = read_flags(instruction)
    network = check_run(instruction, flags)
    stage.require_native(instruction)
    scope = MountScope(stage.expander(instruction).word, stage.trees.named, stage.config.workdir)
    mounts = read_mounts(instruction, flags, scope)
    argv = command_line(stage, instruction)
    if not argv:
        raise instruction.error("RUN: expected a command, found an empty list")
    script = None
    if instruction.heredocs:
        text = _shell_text(instruction)
        argv = (*stage.shell, text)
        script = text if _is_only_heredoc(instruction) and text.startswith("#!") else None
    env, args = stage.variables.environment()
    return Run(
        argv=argv,
        env=env,
        args=args,
        workdir=stage.config.workdir,
        user=_user(stage),
        script=script,
        mounts=mounts,
        network=network,
    )


def _is_only_heredoc(instruction: Instruction) -> bool:
    return parse_heredoc(instruction.args[0]) is not None


def _shell_text(instruction: Instruction) -> str:
    # No shell understands CRLF: it comes from an editor that saved the Dockerfile with it.
    if _is_only_heredoc(instruction):
        return _body(instruction.heredocs[0]).replace("\r\n", "\n")
    # The heredocs belong to a command of the line: the shell reads them as they were written.
    bodies = (f"{heredoc.content}{heredoc.name}\n" for heredoc in instruction.heredocs)
    return instruction.args[0] + "\n" + "".join(bodies).replace("\r\n", "\n")


def _body(heredoc: DockerfileHeredoc) -> str:
    return chomp_heredoc_content(heredoc.content) if heredoc.chomp else heredoc.content


def workdir(stage: StageState, instruction: Instruction) -> Operation:
    """Turn a WORKDIR into an operation; relative ones continue the one before.

    Raises:
        InputError: there is no path.
    """
    read_flags(instruction)
    path = one_word(stage, instruction)
    if not path:
        stage.warn(instruction, f"WORKDIR {instruction.operands} expands to nothing and changes nothing")
    if not (stage.workdir_is_own or path.startswith("/")):
        stage.lint.workdir(instruction, path)
    stage.workdir_is_own = True
    stage.change(workdir=absolute(stage.config.workdir, path))
    return Workdir(path=stage.config.workdir, user=_user(stage))


def copy(stage: StageState, instruction: Instruction) -> Operation:
    """Turn a COPY or ADD into an operation.

    Raises:
        InputError: operands or flags are wrong.
    """
    expander = stage.expander(instruction)
    flags = read_flags(instruction)
    check_copy(instruction)
    owner = _owner(stage, instruction, _expanded(expander, flags, "chown"))
    mode = _mode(stage, instruction, _expanded(expander, flags, "chmod"))
    # Variables stay as they are in these, as BuildKit has it.
    exclude = tuple(_pattern(instruction, text) for text in flags.lists.get("exclude", ()))
    parents = flags.switches.get("parents", False)
    link = flags.switches.get("link", False)
    if link and not re.fullmatch("[0-9:]*", owner or ""):
        raise instruction.error(
            f"{instruction.keyword} --link --chown={short(owner or '')}: --link does not look at the image, "
            "so it can't find names",
            hint="give user and group by number",
        )
    *words, last = instruction.args
    target = expander.word(last) or "."
    is_directory = target.endswith("/") or posixpath.basename(target) in (".", "..")
    # BuildKit makes no layer apart where --chmod is given, too.
    link = link and not mode
    if link or ".." in target.split("/"):
        target = absolute(stage.config.workdir, target)
        target = posixpath.join(target, "") if is_directory else target
    sources = _Sources(stage, instruction, expander, flags).read(words)
    if not is_directory:
        _require_single(instruction, len(sources), target)
    elif nameless := next((s.url for s in sources if isinstance(s, Download) and not file_name(s.url)), None):
        raise instruction.error(
            f"ADD: {redacted(nameless)} has no file name", hint="name the file in the destination"
        )
    return Copy(
        sources=sources,
        destination=target,
        workdir="/" if link else stage.config.workdir,
        into=is_directory,
        chown=owner,
        chmod=mode,
        link=link,
        parents=parents,
        exclude=exclude,
        unpack=flags.switches.get("unpack"),
        keyword=instruction.keyword,
    )


def check_copy(instruction: Instruction) -> None:
    """Look at what a COPY or ADD is without variables.

    Raises:
        InputError: an operand is missing, or the destination is a heredoc.
    """
    if len(instruction.args) < 2:
        raise instruction.error(
            f"{instruction.keyword}: expected a source and a destination, "
            f"found {short(instruction.operands)!r}"
        )
    if not instruction.json and parse_heredoc(instruction.args[-1]):
        raise instruction.error(f"{instruction.keyword}: the destination can't be a heredoc")


@dataclass(frozen=True)
class _Sources:
    """Reads the sources of one COPY or ADD."""

    stage: StageState
    instruction: Instruction
    expander: Expander
    flags: Flags

    def read(self, words: list[str]) -> tuple[FileSet, ...]:
        """Return what `words` name, in their order."""
        tree = self._tree()
        checksum = _expanded(self.expander, self.flags, "checksum")
        bodies = {heredoc.name: heredoc for heredoc in self.instruction.heredocs}
        sources: list[FileSet] = []
        for word in words:
            marker = parse_heredoc(word) if bodies else None
            if marker is not None and (heredoc := bodies.get(marker.name)):
                text = _body(heredoc)
                sources.append(Heredoc(heredoc.name, self.expander.body(text) if heredoc.expand else text))
            else:
                sources.append(self._source(self.expander.word(word), tree, checksum))
        if checksum is not None and not (len(sources) == 1 and isinstance(sources[0], Download | GitTree)):
            raise self.instruction.error(
                "ADD --checksum needs exactly one source, and that a URL",
                hint="files of the build context need none",
            )
        return tuple(sources)

    def _tree(self) -> TreeRef:
        name = self.flags.values.get("from", "")
        if not name:
            return ContextRef()
        if self.expander.has_variables(name):
            raise self.instruction.error(
                "COPY --from can't hold variables",
                hint="name a stage for it: FROM …$VARIABLE… AS name, and --from=name",
            )
        return self.stage.trees.numbered(self.instruction, name)

    def _source(self, text: str, tree: TreeRef, checksum: str | None) -> FileSet:
        keyword, url = self.instruction.keyword, scheme(text)
        if keyword == "COPY" and url:
            raise self.instruction.error(f"COPY can't download {redacted(text)}", hint="use ADD")
        try:
            keep = self.flags.switches.get("keep-git-dir")
            repository = read_git(text, keep_git_dir=keep, checksum=checksum or "")
            if repository is None and url in ("http", "https"):
                return Download(text, "" if checksum is None else check_digest(checksum))
        except ValueError as error:
            what = f"ADD {redacted(text)}" if checksum is None else "--checksum"
            raise self.instruction.error(f"{what}: {error}") from error
        if repository is not None:
            if keyword == "COPY":
                raise self.instruction.error(f"COPY can't clone {redacted(text)}", hint="use ADD")
            return repository
        if url:
            raise self.instruction.error(
                f"ADD: expected http://, https://, git:// or ssh://, found {url + '://'!r}"
            )
        if tree == ContextRef():
            self.stage.lint.source(self.instruction, text)
        if not text:
            raise self.instruction.error("a source is empty", hint="name . for the whole build context")
        return Files(text, tree)


def _expanded(expander: Expander, flags: Flags, name: str) -> str | None:
    text = flags.values.get(name)
    return None if text is None else expander.word(text)


def _pattern(instruction: Instruction, text: str) -> str:
    try:
        IgnorePattern.parse(text)
    except BadPattern as error:
        raise instruction.error(
            f"{instruction.keyword} --exclude: the pattern {short(text)!r} is malformed: {error}"
        ) from error
    return text


def _require_single(instruction: Instruction, count: int, target: str) -> None:
    if count > 1:
        raise several_sources(instruction.error, instruction.keyword, target)


def several_sources(error: Callable[..., Exception], keyword: str, target: str) -> Exception:
    """Return the error of several sources for a destination that is not a directory."""
    return error(
        f"{keyword} of several sources needs a destination that ends in /, found {short(target)!r}",
        hint=f"write {target}/",
    )


def _owner(stage: StageState, instruction: Instruction, text: str | None) -> str | None:
    if not text:
        _warn_of_empty(stage, instruction, "chown", text)
        return None
    if not _OWNER.fullmatch(text):
        raise instruction.error(
            f"--chown: expected user or user:group, by name or number, found {short(text)!r}"
        )
    require_ids(instruction, "--chown", text)
    # What is left out is what it would be without the colon: root, and the group of the user.
    user, _, group = text.partition(":")
    return f"{user or '0'}:{group}" if group else user or "0"


def _mode(stage: StageState, instruction: Instruction, text: str | None) -> str | None:
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


def _warn_of_empty(stage: StageState, instruction: Instruction, flag: str, text: str | None) -> None:
    if text is not None:
        stage.warn(instruction, f"{instruction.keyword} --{flag} is empty, which is as if it were not there")


HANDLERS: Final[dict[str, Callable[[StageState, Instruction], Operation]]] = {
    "ADD": copy,
    "COPY": copy,
    "RUN": run,
    "WORKDIR": workdir,
}
