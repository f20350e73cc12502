"""Repositories, which the system's git fetches: contexts, and sources of ADD.

One is complete on the host before anything of the build starts. Few builds have one, so this module is
imported when it is needed. https://docs.docker.com/reference/dockerfile/#adding-files-from-a-git-repository
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.context.entries import FetchLimits
from firebuild_bootstrap.dockerfile.graph import GitTree
from firebuild_bootstrap.dockerfile.operations import redacted, split_login
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers.tar import LayerError
from firebuild_bootstrap.layers.tree import members
from firebuild_bootstrap.programs import LimitExceeded, NotStarted, run_program
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sizes import human_size
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

# The name of a commit, or how it begins.
_COMMIT: Final = re.compile("[0-9a-f]{4,64}")
# Neither the user's configuration nor a hook or a helper of it, and no protocol that reads this host's files.
_OPTIONS: Final = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "advice.detachedHead=false"),
    *("-c", "init.defaultBranch=main"),
    *("-c", "gc.auto=0"),
    *("-c", "core.logAllRefUpdates=false"),  # a reflog has the user and the name of this host, and the time
    *("-c", "http.lowSpeedLimit=1"),
)
_ENVIRONMENT: Final[Mapping[str, str]] = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_ALLOW_PROTOCOL": "http:https:git:ssh",
    # Nobody is there to answer.
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "/bin/false",
    "SSH_ASKPASS": "/bin/false",
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes",
    "LC_ALL": "C",
}

# A credential helper (gitcredentials(7)). It finds the login in git's environment, which its user alone can
# read; arguments can be read by every user of the host.
_HELPER: Final = """!login() {
test "$1" != get || printf 'username=%s\\npassword=%s\\n' "$FIREBUILD_GIT_USER" "$FIREBUILD_GIT_PASSWORD"
}; login"""

_SSH_PASSWORD: Final = re.compile("ssh://[^/@]*:[^/]*@", re.IGNORECASE)

_LONGEST_WORDS: Final = 4000  # git cuts what it says, with a path in it, at 4096 bytes

# What git says where ssh failed, whose words are in the line before; the lines behind it are general advice.
_SSH_FAILED: Final = "Could not read from remote repository."

_INSTALL: Final = "install it, or clone into the build context"
# Of a shell that can't execute a program, or takes it for a script (sh of POSIX, "Exit Status for Commands").
_OF_THE_SHELL: Final = frozenset({2, 126, 127})
_SMALLER: Final = "name a smaller repository, or clone what is needed of it into the build context"


@dataclass(frozen=True)
class Cloned:
    """A repository that was fetched: its directory, and the full name of its commit."""

    path: Path
    commit: str


def clone(
    tree: GitTree,
    directory: Path,
    *,
    location: Location | None,
    limits: FetchLimits,
    environment: Mapping[str, str] = os.environ,
    check: Callable[[], None] = lambda: None,
) -> Cloned:
    """Fetch a repository, and check its files out into a new directory below `directory`.

    Files get the time of their commit, so that the same commit gives the same files.

    Args:
        tree: what to fetch.
        directory: an existing directory; the caller removes it with what is made in it.
        location: the instruction, for errors.
        limits: how long it may take, and how much disk and memory.
        environment: of git, for example with an SSH agent; `GIT_*` of it counts for nothing.
        check: called several times a second; what it raises ends git.

    Returns:
        the repository; `tree.subdirectory` is below its directory.

    Raises:
        InputError: there is no git, the repository or ref does not exist or can't be read without a question,
            it takes more than the limits allow, or the commit is not the expected one.
    """
    path = Path(tempfile.mkdtemp(prefix="git-", dir=directory))
    git = _Git(path, tree.url, location, limits, environment=environment, check=check)
    git.run("init", "--quiet", "--template=")
    git.run("remote", "add", "origin", "--", git.url)
    commit = git.run("rev-parse", "--verify", "--end-of-options", _fetch(git, tree.ref))
    if not commit.startswith(tree.checksum):
        raise git.error(
            f"expected the commit {tree.checksum}, found {commit}",
            "check that it is the one you mean before you change --checksum",
        )
    git.run("checkout", "--quiet", "--detach", commit)
    if tree.submodules:
        git.run("submodule", "--quiet", "update", "--init", "--recursive", "--checkout", "--force")
    git.measure()
    committed = int(git.run("show", "--no-patch", "--format=%ct", commit))
    if tree.keep_git_dir:
        (path / ".git/FETCH_HEAD").unlink()  # as BuildKit: it says how this was fetched
    else:
        _remove_git_directories(path)
    _set_times(path, committed)
    return Cloned(path, commit)


def _fetch(git: _Git, ref: str) -> str:
    """Fetch what is needed for `ref`, and return what git calls its commit then."""
    words = ("fetch", "--quiet", "--no-recurse-submodules", "--force")
    one = ("--no-tags", "origin", "--", ref or "HEAD")
    with suppress(_GitError):
        git.run(*words, "--depth=1", *one)
        return "FETCH_HEAD^{commit}"
    try:
        git.run(*words, *one)  # plain web servers know no depth
        return "FETCH_HEAD^{commit}"
    except _GitError:
        # Many servers don't give a commit by its name, and none by the beginning of it.
        if not _COMMIT.fullmatch(ref):
            raise
    git.run(*words, "--tags", "origin", "--", "+refs/heads/*:refs/remotes/origin/*")
    return f"{ref}^{{commit}}"


def _remove_git_directories(path: Path) -> None:
    remove_tree(path / ".git")
    for directory, name, status in members(str(path)):
        if name == ".git" and not stat.S_ISDIR(status.st_mode):  # of a submodule
            os.unlink(name, dir_fd=directory)


def _set_times(path: Path, seconds: int) -> None:
    for directory, name, _ in members(str(path)):
        os.utime(name, (seconds, seconds), dir_fd=directory, follow_symlinks=False)
    os.utime(path, (seconds, seconds))


class _GitError(InputError):
    """Git could not do what it was asked to."""


class _Git:
    """The system's git, in the directory of one repository, within the limits of a fetch.

    Args:
        path: where it works.
        url: of the repository, perhaps with a login, which git alone is told.
        location: the instruction, for errors.
        limits: of all that it runs together.
        environment: of git; `GIT_*` of it counts for nothing.
        check: called several times a second; what it raises ends git.

    Raises:
        InputError: there is no git, or the login is one that no server can be given.
    """

    def __init__(
        self,
        path: Path,
        url: str,
        location: Location | None,
        limits: FetchLimits,
        *,
        environment: Mapping[str, str],
        check: Callable[[], None],
    ) -> None:
        self._path = path
        self._shown = redacted(url)
        self._location = location
        self._limits = limits
        self._end = time.monotonic() + limits.total_seconds
        self._measured = 0.0
        self._check = check
        kept = {name: value for name, value in environment.items() if not name.startswith("GIT_")}
        self._environment = {**kept, **_ENVIRONMENT}
        self.url, login = split_login(url)
        self._options = (*_OPTIONS, *(self._log_in(login) if login else ()))
        if _SSH_PASSWORD.match(self.url):  # it would be an argument of ssh, and is of no use there
            raise self.error("ssh takes no password from a URL", "`--ssh default` gives git an SSH agent")
        program = shutil.which("git", path=environment.get("PATH"))
        if program is None:
            raise self.error("the program git was not found", _INSTALL)
        self._program = program

    def _log_in(self, login: str) -> tuple[str, ...]:
        """Have git log in at the server of the URL, and at no other; returns options."""
        user, _, password = map(urllib.parse.unquote, login.partition(":"))
        if not (user + password).isprintable():
            raise self.error("the login in the URL has a line break, or another unprintable character")
        self._environment |= {"FIREBUILD_GIT_USER": user, "FIREBUILD_GIT_PASSWORD": password}
        server = "/".join(self.url.split("/", 3)[:3])
        return ("-c", f"credential.{server}.helper={_HELPER}")

    def run(self, *words: str) -> str:
        """Run git, and return what it writes.

        Raises:
            _GitError: it fails.
            InputError: it takes too much.
        """
        slow = f"http.lowSpeedTime={self._limits.idle_seconds:.0f}"
        try:
            done = run_program(
                [self._program, *self._options, "-c", slow, *words],
                cwd=self._path,
                env=self._environment,
                umask=0o022,
                seconds=max(0.0, self._end - time.monotonic()),
                memory=self._limits.memory,
                check=self._watch,
            )
        except LimitExceeded as error:
            late = time.monotonic() >= self._end
            why = f"it took longer than {counted(self._limits.total_seconds, 'second')}" if late else error
            raise self.error(f"git {words[0]}: {why}", _SMALLER) from error
        except NotStarted as error:
            raise self.error(error.message, error.hint) from error
        if done.returncode in _OF_THE_SHELL:
            self._check_start()
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            last = (said.splitlines() or [f"git {words[0]} failed"])[-1].removeprefix("fatal: ")
            if os.strerror(errno.ENAMETOOLONG) in last or len(last) > _LONGEST_WORDS:
                raise self.error(f"a path in it is too long for Linux: {one_line(last, 200)}")
            if "out of memory" in said.lower():
                last = one_line(last, 300)
                raise self.error(
                    f"git may have {human_size(self._limits.memory)} of memory: {last}", _SMALLER
                )
            reason = one_line(_without_proxy(_reason(said) or last, self._environment), 300)
            raise self.error(reason, _ssh_hint(said), _GitError)
        return done.stdout.decode("utf-8", "replace").strip()

    def _check_start(self) -> None:
        """Raise an `InputError` if git itself can't be started."""
        try:
            run_program([self._program, "--version"], install=_INSTALL)
        except LimitExceeded:
            return
        except NotStarted as error:
            raise self.error(error.message, error.hint) from error

    def _watch(self) -> None:
        """Measure the disk use every now and then, for not more than a tenth of the time."""
        self._check()
        began = time.monotonic()
        if began >= self._measured:
            with suppress(LayerError, FileNotFoundError):  # what git has removed meanwhile
                self.measure()
            now = time.monotonic()
            self._measured = now + max(1.0, 10 * (now - began))

    def measure(self) -> None:
        """Look at what has come so far.

        Raises:
            InputError: that is more than the limits allow.
        """
        size = 0
        for entries, (_, _, status) in enumerate(members(str(self._path)), 1):
            size += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            if size > self._limits.total_bytes:
                raise self.error(f"it has more than {human_size(self._limits.total_bytes)} on disk", _SMALLER)
            if entries > self._limits.total_entries:
                raise self.error(
                    f"it has more than {self._limits.total_entries} files and directories", _SMALLER
                )

    def error(self, why: str, hint: str | None = None, kind: type[InputError] = InputError) -> InputError:
        """Return an error that names the repository."""
        return kind(f"{self._shown} can't be fetched: {why}", hint=hint, location=self._location)


def _without_proxy(words: str, environment: Mapping[str, str]) -> str:
    """Leave out of git's words the proxy that it could not use, because it may have a password in it."""
    for name, value in environment.items():
        if value and name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            words = words.replace(value, "…")
    # As libcurl and git word it, who may have changed something of the value.
    return re.sub(
        "(Unsupported proxy syntax in|Invalid proxy URL) .*",
        "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is malformed",
        words,
    )


def _reason(said: str) -> str:
    """Return why git failed: its first fatal error, as all others come of that, or what ssh says of it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    fatal = [at for at, line in enumerate(lines) if line.startswith("fatal: ")]
    if not fatal:
        return lines[-1] if lines else ""
    cause = lines[fatal[0]].removeprefix("fatal: ")
    if cause == _SSH_FAILED and fatal[0]:
        cause = lines[fatal[0] - 1]
    last = lines[-1].removeprefix("fatal: ")  # of a submodule: which one
    return f"{last}: {cause}" if last.startswith("Failed to ") and last != cause else cause


def _ssh_hint(said: str) -> str | None:
    if _SSH_FAILED not in said:
        return None
    return "`--ssh default` gives git an SSH agent, and ~/.ssh/known_hosts has to have the host's key"
