"""Sources of ADD that come over the network: downloads, and repositories that the system's git fetches.

Both are complete on the host before anything of the build starts. Few builds have one, so this module is
imported when it is needed. https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url and
https://docs.docker.com/reference/dockerfile/#adding-files-from-a-git-repository
"""

from __future__ import annotations

import base64
import errno
import hashlib
import http.client
import io
import os
import re
import shutil
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, Final

from firebuild_bootstrap.context.archive import Archive, is_archive
from firebuild_bootstrap.context.entries import Entry, FetchLimits, Group, checked
from firebuild_bootstrap.dockerfile.graph import GitTree
from firebuild_bootstrap.dockerfile.operations import file_name, redacted, split_login
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.layers.tar import LayerError
from firebuild_bootstrap.layers.tree import members
from firebuild_bootstrap.programs import LimitExceeded, run_program
from firebuild_bootstrap.removal import remove_tree
from firebuild_bootstrap.sizes import human_size
from firebuild_bootstrap.values import dataclass
from firebuild_pki.addresses import proxy_for
from firebuild_pki.connections import BoundedResponse, UnusableProxy, client_context, proxy_parts
from firebuild_pki.display import counted, one_line

_CHUNK: Final = 1024 * 1024
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

_ELSEWHERE: Final = "download it into the build context, and COPY it"
_AGAIN: Final = f"try again, or {_ELSEWHERE}"
_SMALLER: Final = "name a smaller repository, or clone what is needed of it into the build context"


@dataclass(frozen=True)
class RemoteFile:
    """A downloaded file.

    Args:
        url: where it came from, without what may be secret.
        name: file name from the URL, empty if it has none.
        path: where its content is now.
        size: bytes.
        mtime_ns: from `Last-Modified`, else 0 (1970), in nanoseconds.
        digest: `ALGORITHM:hex` of its content; the algorithm is that of the checksum, or else sha256.
    """

    url: str
    name: str
    path: Path
    size: int
    mtime_ns: int
    digest: str


def fetch(
    url: str,
    directory: Path,
    *,
    checksum: str,
    location: Location | None,
    limits: FetchLimits,
    clock: Callable[[], float] = time.monotonic,
    check: Callable[[], None] = lambda: None,
) -> RemoteFile:
    """Download `url` (http or https) to a new file in `directory`.

    Args:
        url: may hold a user name and password for basic authentication.
        directory: an existing directory; the caller removes it with the file.
        checksum: what the content has to hash to, as `ALGORITHM:hex`; empty for anything.
        location: the instruction, for errors.
        limits: how long it may take.
        clock: monotonic seconds.
        check: called at each piece; what it raises ends the download.

    Raises:
        InputError: the URL is malformed, the server can't be reached, answers with anything but 2xx,
            breaks off or is too slow, or the checksum differs.
    """
    shown = redacted(url)

    def failed(why: str, hint: str | None = None) -> InputError:
        return InputError(f"{shown} can't be downloaded: {why}", hint=hint, location=location)

    try:
        request = _request(urllib.parse.urlsplit(url))
        with _opener().open(request, timeout=limits.idle_seconds) as response:
            deadline = clock() + limits.total_seconds
            return _store(
                response,
                directory,
                shown=shown,
                checksum=checksum,
                failed=failed,
                late=lambda: clock() > deadline,
                most=limits.total_bytes,
                check=check,
            )
    except urllib.error.HTTPError as error:
        with error:
            raise failed(
                f"the server answered {error.code} {error.reason}",
                "is the URL right? where it needs a login, download it first and COPY it",
            ) from error
    except http.client.IncompleteRead as error:  # of a body in chunks, whose length nobody announced
        raise failed("the connection broke off before the end", _AGAIN) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        words = str(reason)
        if isinstance(reason, OSError) and reason.strerror and not isinstance(reason, ssl.SSLError):
            words = reason.strerror.lower()  # without its number
        if proxied := _is_unreached(error) and proxy_for(url, os.environ, plain=True) is not None:
            words = f"the proxy that the environment names did not connect to it: {words}"
        raise failed(words or type(error).__name__, _hint(error, proxied=proxied)) from error


def _is_unreached(error: Exception) -> bool:
    reason = error.reason if isinstance(error, urllib.error.URLError) else None
    return isinstance(reason, OSError) and not isinstance(reason, ssl.SSLError)


def _hint(error: Exception, *, proxied: bool) -> str | None:
    if not isinstance(error, urllib.error.URLError):  # it was reached
        return None
    if isinstance(error.reason, ssl.SSLCertVerificationError):
        return "SSL_CERT_FILE names the file of the CAs to trust"
    if proxied:
        return "is it running, and its address right? NO_PROXY names what is reached without it"
    if _is_unreached(error):
        return "where only a proxy reaches it, HTTPS_PROXY and HTTP_PROXY name that"
    return None


def _store(
    response: http.client.HTTPResponse,
    directory: Path,
    *,
    shown: str,
    checksum: str,
    failed: Callable[..., InputError],
    late: Callable[[], bool],
    most: int,
    check: Callable[[], None],
) -> RemoteFile:
    algorithm = checksum.partition(":")[0] or "sha256"
    digest = hashlib.new(algorithm)
    size = 0
    descriptor, name = tempfile.mkstemp(prefix="download-", dir=directory)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := response.read1(_CHUNK):
            check()
            digest.update(chunk)
            size += file.write(chunk)
            if size > most:
                raise failed(f"it has more than {counted(most, 'byte')}", _ELSEWHERE)
            if late():
                raise failed("it took too long", _ELSEWHERE)
    announced = response.headers.get("Content-Length")
    if announced is not None and announced.isdecimal() and int(announced) != size:
        raise failed(f"the connection broke off after {size} of {counted(int(announced), 'byte')}", _AGAIN)
    found = f"{algorithm}:{digest.hexdigest()}"
    if checksum and found != checksum:
        raise failed(
            f"expected the checksum {checksum}, found {found}",
            "check that the file is the one you mean before you change --checksum",
        )
    return RemoteFile(shown, file_name(shown), Path(name), size, _modified(response.headers), found)


def _modified(headers: Message) -> int:
    try:
        return int(parsedate_to_datetime(headers.get("Last-Modified", "")).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError):
        return 0


def _request(parsed: urllib.parse.SplitResult) -> urllib.request.Request:
    if parsed.hostname is None:
        raise ValueError("it names no host")
    address = parsed._replace(netloc=parsed.netloc.rpartition("@")[2], fragment="").geturl()
    # Spaces and the like, decoded by the Dockerfile's quoting, have to travel encoded.
    request = urllib.request.Request(urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]"))  # noqa: S310
    request.add_header("User-Agent", "firebuild")
    if parsed.username is not None:
        pair = f"{urllib.parse.unquote(parsed.username)}:{urllib.parse.unquote(parsed.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return request


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0917
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # or urllib reads all of its body, however much that is
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise urllib.error.URLError("the server redirects from https to an unprotected URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Proxies(urllib.request.ProxyHandler):
    """The proxies of the environment as Go's programs read it: urllib knows no networks in NO_PROXY."""

    def __init__(self) -> None:
        super().__init__({})

    def http_open(self, request: urllib.request.Request) -> Any:
        """Have the request go to its proxy; None has another handler send it."""
        proxy = proxy_for(request.full_url, os.environ, plain=True)
        if proxy is None:
            return None
        try:
            parts = proxy_parts(proxy)
        except UnusableProxy as error:
            raise urllib.error.URLError(str(error)) from None
        if parts.scheme != "http":
            raise urllib.error.URLError("a proxy that speaks TLS is for registries only")
        return self.proxy_open(request, parts.geturl(), request.type)

    https_open = http_open


class _Bounded(urllib.request.AbstractHTTPHandler):
    """Makes connections whose answers begin in time."""

    def do_open(self, http_class: Any, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        def connection(*given: Any, **named: Any) -> http.client.HTTPConnection:
            made: http.client.HTTPConnection = http_class(*given, **named)
            made.response_class = BoundedResponse
            return made

        return super().do_open(connection, *args, **kwargs)


class _Plain(_Bounded, urllib.request.HTTPHandler):
    pass


class _TLS(_Bounded, urllib.request.HTTPSHandler):
    pass


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS only, with the host's proxies: a redirect can't reach files or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Proxies(),
        urllib.request.UnknownHandler(),
        _Plain(),
        _TLS(context=client_context()),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def remote_group(remote: RemoteFile, location: Location | None, *, unpack: bool = False) -> Group:
    """Return the group of a downloaded file: mode 0600, named after the last name in its URL.

    Args:
        remote: the download.
        location: the instruction, for errors.
        unpack: if it is an archive, its members.
    """

    def content() -> io.BufferedReader:
        return checked(_open(remote.path, location), remote.size, name=remote.url, location=location)

    if unpack:
        with content() as file:
            archive = is_archive(file)
        if archive:
            return Group(remote.url, Archive(remote.url, content, location).entries, digest=remote.digest)
    entry = Entry(
        source=remote.url,
        path=remote.name or "download",
        kind=tar.FILE,
        mode=0o600,
        mtime_ns=remote.mtime_ns,
        size=remote.size,
        open=content,
    )
    return Group(remote.url, lambda: iter((entry,)), digest=remote.digest)


def _open(path: Path, location: Location | None) -> io.FileIO:
    try:
        return io.FileIO(path)
    except OSError as error:
        raise InputError(f"the download {path} can't be read: {error}", location=location) from error


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
    made = _Clone(tree, directory, location, limits, environment=environment, check=check)
    return Cloned(made.path, made.commit)


class _GitError(InputError):
    """Git could not do what it was asked to."""


class _Clone:
    def __init__(
        self,
        tree: GitTree,
        directory: Path,
        location: Location | None,
        limits: FetchLimits,
        *,
        environment: Mapping[str, str],
        check: Callable[[], None],
    ) -> None:
        self._location = location
        self._shown = redacted(tree.url)
        self._limits = limits
        self._end = time.monotonic() + limits.total_seconds
        self._measured = 0.0
        self._check = check
        kept = {name: value for name, value in environment.items() if not name.startswith("GIT_")}
        self._environment = {**kept, **_ENVIRONMENT}
        url, login = split_login(tree.url)
        self._options = (*_OPTIONS, *(self._log_in(url, login) if login else ()))
        if _SSH_PASSWORD.match(url):  # it would be an argument of ssh, and is of no use there
            raise self._error("ssh takes no password from a URL", "`--ssh default` gives git an SSH agent")
        self._program = shutil.which("git", path=environment.get("PATH"))
        if self._program is None:
            raise self._error("the program git was not found", "install it, or clone into the build context")
        self.path = Path(tempfile.mkdtemp(prefix="git-", dir=directory))
        self._git("init", "--quiet", "--template=")
        self._git("remote", "add", "origin", "--", url)
        commit = self.commit = self._git("rev-parse", "--verify", "--end-of-options", self._fetch(tree.ref))
        if not commit.startswith(tree.checksum):
            raise self._error(
                f"expected the commit {tree.checksum}, found {commit}",
                "check that it is the one you mean before you change --checksum",
            )
        self._git("checkout", "--quiet", "--detach", commit)
        if tree.submodules:
            self._git("submodule", "--quiet", "update", "--init", "--recursive", "--checkout", "--force")
        self._measure()
        committed = self._git("show", "--no-patch", "--format=%ct", commit)
        if tree.keep_git_dir:
            (self.path / ".git/FETCH_HEAD").unlink()  # as BuildKit: it says how this was fetched
        else:
            self._remove_git_directories()
        self._set_times(int(committed))

    def _log_in(self, url: str, login: str) -> tuple[str, ...]:
        """Have git log in at the server of `url`, and at no other; returns options."""
        user, _, password = map(urllib.parse.unquote, login.partition(":"))
        if not (user + password).isprintable():
            raise self._error("the login in the URL has a line break, or another unprintable character")
        self._environment |= {"FIREBUILD_GIT_USER": user, "FIREBUILD_GIT_PASSWORD": password}
        server = "/".join(url.split("/", 3)[:3])
        return ("-c", f"credential.{server}.helper={_HELPER}")

    def _fetch(self, ref: str) -> str:
        """Fetch what is needed for `ref`, and return what git calls its commit then."""
        words = ("fetch", "--quiet", "--no-recurse-submodules", "--force")
        one = ("--no-tags", "origin", "--", ref or "HEAD")
        with suppress(_GitError):
            self._git(*words, "--depth=1", *one)
            return "FETCH_HEAD^{commit}"
        try:
            self._git(*words, *one)  # plain web servers know no depth
            return "FETCH_HEAD^{commit}"
        except _GitError:
            # Many servers don't give a commit by its name, and none by the beginning of it.
            if not _COMMIT.fullmatch(ref):
                raise
        self._git(*words, "--tags", "origin", "--", "+refs/heads/*:refs/remotes/origin/*")
        return f"{ref}^{{commit}}"

    def _remove_git_directories(self) -> None:
        remove_tree(self.path / ".git")
        for directory, name, status in members(str(self.path)):
            if name == ".git" and not stat.S_ISDIR(status.st_mode):  # of a submodule
                os.unlink(name, dir_fd=directory)

    def _set_times(self, seconds: int) -> None:
        for directory, name, _ in members(str(self.path)):
            os.utime(name, (seconds, seconds), dir_fd=directory, follow_symlinks=False)
        os.utime(self.path, (seconds, seconds))

    def _git(self, *words: str) -> str:
        """Run git, and return what it writes.

        Raises:
            _GitError: it fails.
            InputError: it takes too much.
        """
        assert self._program is not None  # found when this began  # noqa: S101
        slow = f"http.lowSpeedTime={self._limits.idle_seconds:.0f}"
        try:
            done = run_program(
                [self._program, *self._options, "-c", slow, *words],
                cwd=self.path,
                env=self._environment,
                umask=0o022,
                seconds=max(0.0, self._end - time.monotonic()),
                memory=self._limits.memory,
                check=self._watch,
            )
        except LimitExceeded as error:
            late = time.monotonic() >= self._end
            why = f"it took longer than {counted(self._limits.total_seconds, 'second')}" if late else error
            raise self._error(f"git {words[0]}: {why}", _SMALLER) from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            last = (said.splitlines() or [f"git {words[0]} failed"])[-1].removeprefix("fatal: ")
            if os.strerror(errno.ENAMETOOLONG) in last or len(last) > _LONGEST_WORDS:
                raise self._error(f"a path in it is too long for Linux: {one_line(last, 200)}")
            if "out of memory" in said.lower():
                last = one_line(last, 300)
                raise self._error(
                    f"git may have {human_size(self._limits.memory)} of memory: {last}", _SMALLER
                )
            reason = one_line(_without_proxy(_reason(said) or last, self._environment), 300)
            raise self._error(reason, _ssh_hint(said), _GitError)
        return done.stdout.decode("utf-8", "replace").strip()

    def _watch(self) -> None:
        """Measure the disk use every now and then, for not more than a tenth of the time."""
        self._check()
        began = time.monotonic()
        if began >= self._measured:
            with suppress(LayerError, FileNotFoundError):  # what git has removed meanwhile
                self._measure()
            now = time.monotonic()
            self._measured = now + max(1.0, 10 * (now - began))

    def _measure(self) -> None:
        size = 0
        for entries, (_, _, status) in enumerate(members(str(self.path)), 1):
            size += 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            if size > self._limits.total_bytes:
                raise self._error(
                    f"it has more than {human_size(self._limits.total_bytes)} on disk", _SMALLER
                )
            if entries > self._limits.total_entries:
                raise self._error(
                    f"it has more than {self._limits.total_entries} files and directories", _SMALLER
                )

    def _error(self, why: str, hint: str | None = None, kind: type[InputError] = InputError) -> InputError:
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
