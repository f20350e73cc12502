"""Instructions that do something to the files of a stage: RUN, COPY, ADD and WORKDIR become operations.

https://docs.docker.com/reference/dockerfile/
"""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Final

from e2b_dockerfile_utils import DockerfileHeredoc, chomp_heredoc_content, parse_heredoc

from firebuild_bootstrap.dockerfile.expansion import Expander
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
from firebuild_bootstrap.dockerfile.stage import StageState
from firebuild_bootstrap.dockerfile.syntax import Flags, Instruction, read_flags, short
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.matching import BadPattern, IgnorePattern
from firebuild_bootstrap.sizes import parse_bool
from firebuild_bootstrap.wire import absolute
from firebuild_pki.values import dataclass

_OCTAL: Final = re.compile(r"0*[0-7]{1,4}")
_SYMBOLIC: Final = re.compile(r"[ugoa]*([-+=]([rwxXst]*|[ugo]))+(,[ugoa]*([-+=]([rwxXst]*|[ugo]))+)*")
_OWNER: Final = re.compile(r"[^:\s]*(:[^:\s]*)?")
_AUTHORITY: Final = re.compile("^[^:/?#]+://[^/?#]*")
_CREDENTIALS: Final = re.compile("^([^:/?#]+://)[^/]*@")
# A host with something else than a port: a password, most likely, with a character that ends it here.
_CUT_LOGIN: Final = re.compile(r"^([^:/?#]+://)[^/?#@\[\]]*:(?![0-9]*(?:[/?#]|$)|[^/?#]*@)")
_LOGIN: Final = re.compile("^(https?://)([^/]*)@", re.IGNORECASE)
_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_GIT_URL: Final = re.compile(r"(git|ssh|https?)://", re.IGNORECASE)
# `git@host:path`, as scp and git write it.
_SCP: Final = re.compile(r"[a-zA-Z0-9-_.]+@[a-zA-Z0-9-.]+:(?!//).+", re.DOTALL)
_COMMIT: Final = re.compile("[0-9a-f]{1,64}")
_DIGEST_SIZES: Final = {"sha256": 64, "sha384": 96, "sha512": 128}


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
    stage.carry(instruction, len(argv) + (len(stage.variables.values) if stage.variables.changed else 0))
    env, args = stage.variables.environment()
    return Run(
        argv=argv,
        env=env,
        args=args,
        proxies=stage.variables.proxies(),
        workdir=stage.config.workdir,
        user=_user(stage),
        script=script,
        mounts=mounts,
        network=network,
    )


def _marker(word: str) -> DockerfileHeredoc | None:
    """Read `<<NAME`; a word whose quotes or numbers are wrong is none, and whoever expands it says so."""
    try:
        return parse_heredoc(word)
    except ValueError:
        return None


def _is_only_heredoc(instruction: Instruction) -> bool:
    return _marker(instruction.args[0]) is not None


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
    stage.carry(instruction, text=stage.config.workdir)
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
    if link and not re.fullmatch("([0-9]+|root)?(:([0-9]+|root))?", owner or ""):
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
        if len(sources) > 1:
            raise several_sources(instruction.keyword, target, instruction.location)
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
    if not instruction.json and _marker(instruction.args[-1]):
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
            marker = _marker(word) if bodies else None
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
                return Download(text, "" if checksum is None else _check_digest(checksum))
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


def several_sources(keyword: str, target: str, location: Location) -> InputError:
    """Return the error of several sources for a destination that is not a directory."""
    return InputError(
        f"{keyword} of several sources needs a destination that ends in /, found {short(target)!r}",
        hint=f"write {target}/",
        location=location,
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


# --- URLs and git repositories --------------------------------------------------------------------

# https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url and
# https://docs.docker.com/build/concepts/context/#git-repositories; what is a git repository and what a plain
# URL is decided as by BuildKit (dfgitutil.ParseGitRef, gitutil.ParseURL).


def scheme(text: str) -> str:
    """Return the scheme of a URL in lower case; empty if `text` is not one."""
    url = _URL.match(text)
    return url[1].lower() if url else ""


def redacted(url: str) -> str:
    """Return a URL for messages: without user name, password and query, any of which may be a secret."""
    if cut := _CUT_LOGIN.match(url):  # where the password ends is anybody's guess
        return f"{cut[1]}…"
    return _CREDENTIALS.sub(r"\1", url.partition("#")[0].partition("?")[0])


def split_login(url: str) -> tuple[str, str]:
    """Return the URL of a git repository without the login for HTTP that it holds, and that: `user:password`.

    Git would put the whole URL into arguments of its programs, and into `.git/config`.
    """
    login = _LOGIN.match(url)
    return (login[1] + url[login.end() :], login[2]) if login else (url, "")


def file_name(url: str) -> str:
    """Return the last name in the path of a URL, decoded; empty if there is none."""
    path = _AUTHORITY.sub("", url.partition("#")[0].partition("?")[0])
    name = posixpath.basename(urllib.parse.unquote(path))
    return "" if name in (".", "..") or "\0" in name else name


def _check_digest(text: str) -> str:
    """Return the checksum of a download: `sha256:<64 hexadecimal digits>` (also sha384 and sha512).

    Raises:
        ValueError: it is anything else.
    """
    algorithm, _, digest = text.partition(":")
    size = _DIGEST_SIZES.get(algorithm)
    if size is None or not re.fullmatch(f"[0-9a-f]{{{size}}}", digest):
        raise ValueError(f"expected sha256: and 64 hexadecimal digits in lower case, found {text!r:.200}")
    return text


def _check_commit(text: str) -> str:
    """Return the checksum of a git source: the name of a commit, or how it begins.

    Raises:
        ValueError: it is anything else.
    """
    if not _COMMIT.fullmatch(text):
        raise ValueError(f"expected the name of a commit in hexadecimal digits, found {text!r:.200}")
    return text


def read_git(text: str, *, keep_git_dir: bool | None = None, checksum: str = "") -> GitTree | None:
    """Return the git repository that `text` names, or None if it names none.

    Args:
        text: `git@host:path`, `git://…`, `ssh://…`, or `http(s)://….git`; then `#ref:directory`, or
            `?ref=…&branch=…&tag=…&subdir=…&checksum=…&keep-git-dir=…&submodules=…`.
        keep_git_dir: what the flag says, if it is given.
        checksum: what the flag says.

    Raises:
        ValueError: the query is malformed, contradicts itself or a flag.
    """
    url = _GIT_URL.match(text)
    if url:
        _check_host(text)
    if not url and not _SCP.fullmatch(text):
        return None
    remote, _, fragment = text.partition("#")
    remote, _, query = remote.partition("?")
    if url and url[1].lower() in ("http", "https") and not _path_of(remote).endswith(".git"):
        return None
    ref, _, subdirectory = fragment.partition(":")
    asked = _query(query)
    branch, tag = asked.get("branch", ""), asked.get("tag", "")
    if branch and tag:
        raise ValueError("branch and tag can't both be given")
    ref = _same("ref", ref, asked.get("ref", ""))
    ref = _same("ref", ref, tag and f"refs/tags/{tag.removeprefix('refs/tags/')}")
    ref = _same("ref", ref, branch and f"refs/heads/{branch.removeprefix('refs/heads/')}")
    subdirectory = _same("subdir", subdirectory, asked.get("subdir", ""))
    asked_commit = _same("commit", asked.get("commit", ""), asked.get("checksum", ""))
    commit = _same("checksum", checksum, asked_commit)
    if commit:
        _check_commit(commit)
    asked_keep = _switch("keep-git-dir", asked)
    if None not in (asked_keep, keep_git_dir) and asked_keep != keep_git_dir:
        raise ValueError("keep-git-dir of the URL contradicts --keep-git-dir")
    submodules = _switch("submodules", asked)
    return GitTree(
        url=remote,
        ref=ref or asked_commit,
        subdirectory=posixpath.normpath(f"/{subdirectory}").strip("/"),
        keep_git_dir=bool(keep_git_dir or asked_keep),
        checksum=commit,
        submodules=submodules is not False,
    )


def _check_host(url: str) -> None:
    """Refuse a URL of which it is not clear where its host is; nothing of it is shown.

    Raises:
        ValueError: it is one.
    """
    if _CUT_LOGIN.match(url):
        raise ValueError("after the host is no port; in a password / is written %2F, ? is %3F and # is %23")
    try:
        urllib.parse.urlsplit(url)
    except ValueError:
        raise ValueError("its host is malformed") from None  # the message has the login in it


def _path_of(url: str) -> str:
    return _AUTHORITY.sub("", url)


def _query(text: str) -> Mapping[str, str]:
    known = ("ref", "tag", "branch", "subdir", "checksum", "commit", "keep-git-dir", "submodules")
    asked: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=100):
        if name not in known:
            raise ValueError(f"the query {name!r:.80} of a git URL is not known")
        if name in asked:
            raise ValueError(f"the query {name} is given twice")
        if not value and name not in ("keep-git-dir", "submodules"):
            raise ValueError(f"the query {name} has no value")
        asked[name] = value
    return asked


def _switch(name: str, asked: Mapping[str, str]) -> bool | None:
    value = asked.get(name)
    if value is None:
        return None
    if value and parse_bool(value) is None:
        raise ValueError(f"{name}: expected true or false, found {value!r:.80}")
    return not value or parse_bool(value)


def _same(what: str, first: str, second: str) -> str:
    if first and second and first != second:
        raise ValueError(f"{what} is given as {first!r:.80} and as {second!r:.80}")
    return first or second


HANDLERS: Final[dict[str, Callable[[StageState, Instruction], Operation]]] = {
    "ADD": copy,
    "COPY": copy,
    "RUN": run,
    "WORKDIR": workdir,
}
