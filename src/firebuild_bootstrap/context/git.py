"""Repositories that ADD and --build-context name, fetched by the system's git before anything starts.

https://docs.docker.com/reference/dockerfile/#adding-files-from-a-git-repository
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from firebuild_bootstrap.context.entries import FetchLimits
from firebuild_bootstrap.dockerfile.graph import GitTree
from firebuild_bootstrap.dockerfile.remote import redacted
from firebuild_bootstrap.errors import InputError, Location
from firebuild_pki.display import one_line

# The name of a commit, or how it begins.
_COMMIT: Final = re.compile("[0-9a-f]{4,64}")
# Neither the user's configuration nor a hook or a helper of it, and no protocol that reads this host's files.
_OPTIONS: Final = (
    *("-c", "core.hooksPath=/dev/null"),
    *("-c", "advice.detachedHead=false"),
    *("-c", "init.defaultBranch=main"),
    *("-c", "gc.auto=0"),
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


def clone(
    tree: GitTree,
    directory: Path,
    *,
    location: Location | None,
    limits: FetchLimits,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Fetch a repository, and check its files out into a new directory below `directory`.

    Files get the time of their commit, so that the same commit gives the same files.

    Args:
        tree: what to fetch.
        directory: an existing directory; the caller removes it with what is made in it.
        location: the instruction, for errors.
        limits: how long it may take.
        environment: of git, for example with an SSH agent; `GIT_*` of it counts for nothing.

    Returns:
        the directory of the repository; `tree.subdirectory` is below it.

    Raises:
        InputError: there is no git, the repository or ref does not exist or can't be read without a question,
            it takes too long, or the commit is not the expected one.
    """
    return _Clone(tree, directory, location, limits, environment).path


class _Clone:
    def __init__(
        self,
        tree: GitTree,
        directory: Path,
        location: Location | None,
        limits: FetchLimits,
        environment: Mapping[str, str],
    ) -> None:
        self._location = location
        self._shown = redacted(tree.url)
        self._limits = limits
        self._end = time.monotonic() + limits.total_seconds
        kept = {name: value for name, value in environment.items() if not name.startswith("GIT_")}
        self._environment = {**kept, **_ENVIRONMENT}
        self._program = shutil.which("git", path=environment.get("PATH"))
        if self._program is None:
            raise self._error("there is no git on this host", "install it, or clone into the build context")
        self.path = Path(tempfile.mkdtemp(prefix="git-", dir=directory))
        self._git("init", "--quiet", "--template=")
        self._git("remote", "add", "origin", "--", tree.url)
        commit = self._git("rev-parse", "--verify", "--end-of-options", self._fetch(tree.ref))
        if not commit.startswith(tree.checksum):
            raise self._error(
                f"expected the commit {tree.checksum}, found {commit}",
                "check that it is the one you mean before you change --checksum",
            )
        self._git("checkout", "--quiet", "--detach", commit)
        if tree.submodules:
            self._git("submodule", "--quiet", "update", "--init", "--recursive", "--checkout", "--force")
        committed = self._git("show", "--no-patch", "--format=%ct", commit)
        if not tree.keep_git_dir:
            self._remove_git_directories()
        _set_times(self.path, int(committed))

    def _fetch(self, ref: str) -> str:
        """Fetch what is needed for `ref`, and return what git calls its commit then."""
        words = ("fetch", "--quiet", "--no-recurse-submodules", "--force")
        one = ("--no-tags", "origin", "--", ref or "HEAD")
        with suppress(InputError):
            self._git(*words, "--depth=1", *one)
            return "FETCH_HEAD^{commit}"
        try:
            self._git(*words, *one)  # plain web servers know no depth
            return "FETCH_HEAD^{commit}"
        except InputError:
            # Many servers don't give a commit by its name, and none by the beginning of it.
            if not _COMMIT.fullmatch(ref):
                raise
        self._git(*words, "--tags", "origin", "--", "+refs/heads/*:refs/remotes/origin/*")
        return f"{ref}^{{commit}}"

    def _remove_git_directories(self) -> None:
        shutil.rmtree(self.path / ".git")
        # Those of submodules are files.
        for directory, _, files in os.walk(self.path):
            if ".git" in files:
                os.unlink(os.path.join(directory, ".git"))

    def _git(self, *words: str) -> str:
        """Run git, and return what it writes.

        Raises:
            InputError: it fails, or takes too long.
        """
        assert self._program is not None  # found when this began  # noqa: S101
        slow = f"http.lowSpeedTime={self._limits.idle_seconds:.0f}"
        command = [self._program, *_OPTIONS, "-c", slow, *words]
        with subprocess.Popen(
            command,
            cwd=self.path,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            umask=0o022,
        ) as process:
            try:
                out, err = process.communicate(timeout=max(0.0, self._end - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise self._error("it took too long") from error
            finally:
                # Also what it has started, such as ssh.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            lines = err.decode("utf-8", "replace").strip().splitlines() or [f"git {words[0]} failed"]
            raise self._error(one_line(lines[-1].removeprefix("fatal: "), 300))
        return out.decode("utf-8", "replace").strip()

    def _error(self, why: str, hint: str | None = None) -> InputError:
        return InputError(f"{self._shown} can't be fetched: {why}", hint=hint, location=self._location)


def _set_times(root: Path, seconds: int) -> None:
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*names, *files):
            os.utime(os.path.join(directory, name), (seconds, seconds), follow_symlinks=False)
    os.utime(root, (seconds, seconds))
