"""Sources of ADD that are not in the build context, as text: URLs, git repositories, checksums.

https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url and
https://docs.docker.com/build/concepts/context/#git-repositories; what is a git repository and what a plain
URL is decided as by BuildKit (dfgitutil.ParseGitRef, gitutil.ParseURL).
"""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from collections.abc import Mapping
from typing import Final

from firebuild_bootstrap.dockerfile.graph import GitTree
from firebuild_bootstrap.dockerfile.syntax import parse_bool

_AUTHORITY: Final = re.compile("^[^:/?#]+://[^/?#]*")
_CREDENTIALS: Final = re.compile("^([^:/?#]+://)[^/]*@")
_URL: Final = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_GIT_URL: Final = re.compile(r"(git|ssh|https?)://", re.IGNORECASE)
# `git@host:path`, as scp and git write it.
_SCP: Final = re.compile(r"[a-zA-Z0-9-_.]+@[a-zA-Z0-9-.]+:(?!//).+", re.DOTALL)
_COMMIT: Final = re.compile("[0-9a-f]{1,64}")
_DIGEST_SIZES: Final = {"sha256": 64, "sha384": 96, "sha512": 128}


def scheme(text: str) -> str:
    """Return the scheme of a URL in lower case; empty if `text` is none."""
    url = _URL.match(text)
    return url[1].lower() if url else ""


def redacted(url: str) -> str:
    """Return a URL for messages: without user name, password and query, any of which may be a secret."""
    return _CREDENTIALS.sub(r"\1", url.partition("#")[0].partition("?")[0])


def file_name(url: str) -> str:
    """Return the last name in the path of a URL, decoded; empty if there is none."""
    path = _AUTHORITY.sub("", url.partition("#")[0].partition("?")[0])
    name = posixpath.basename(urllib.parse.unquote(path))
    return "" if name in (".", "..") or "\0" in name else name


def check_digest(text: str) -> str:
    """Return the checksum of a download: `sha256:<64 hexadecimal digits>` (also sha384 and sha512).

    Raises:
        ValueError: it is anything else.
    """
    algorithm, _, digest = text.partition(":")
    size = _DIGEST_SIZES.get(algorithm)
    if size is None or not re.fullmatch(f"[0-9a-f]{{{size}}}", digest):
        raise ValueError(f"expected sha256: and 64 hexadecimal digits in lower case, found {text!r:.200}")
    return text


def check_commit(text: str) -> str:
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
        check_commit(commit)
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
