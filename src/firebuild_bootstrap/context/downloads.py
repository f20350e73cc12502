"""Downloads by HTTP or HTTPS: sources of ADD, and contexts.

One is complete on the host before anything of the build starts. Few builds have one, so this module is
imported when it is needed. https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from urllib3 import BaseHTTPResponse, HTTPHeaderDict
from urllib3.exceptions import HTTPError, NewConnectionError

from firebuild_bootstrap.context.archive import Archive, is_archive
from firebuild_bootstrap.context.entries import Entry, FetchLimits, Group, checked
from firebuild_bootstrap.dockerfile.operations import file_name, redacted
from firebuild_bootstrap.errors import InputError, Location, reason_of
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.transfers import answer_of
from firebuild_pki.addresses import joined, proxy_for
from firebuild_pki.connections import (
    BY_PROXY,
    CUT_OFF,
    REDIRECTS,
    TlsFault,
    client_context,
    close_now,
    connection_words,
    is_of_proxy,
    make_pool,
    send,
    tls_error,
    tls_fault,
    wrapped,
)
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

_CHUNK: Final = 1024 * 1024
_ELSEWHERE: Final = "download it another way, and build with the file"
_AGAIN: Final = f"try again, or {_ELSEWHERE}"
_UNREACHED: Final = "where only a proxy reaches it, HTTPS_PROXY and HTTP_PROXY name that"
_TLS_REMEDIES: Final = {
    TlsFault.CUT: _AGAIN,
    TlsFault.ISSUER: "SSL_CERT_FILE names the file of the CAs to trust",
}
_MAX_REDIRECTS: Final = 10


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


def download(
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
        check: called again and again; what it raises ends the download, also while the server is silent.

    Raises:
        InputError: the URL is malformed, the server can't be reached, answers with anything but 2xx,
            breaks off or is too slow, or the checksum differs.
    """
    shown = redacted(url)

    def failed(why: str, hint: str | None = None) -> InputError:
        return InputError(f"{shown} can't be downloaded: {why}", hint=hint, location=location)

    def fetched(stopped: Callable[[], None]) -> RemoteFile:
        try:
            with _opened(url, limits.idle_seconds, failed) as response:
                deadline = clock() + limits.total_seconds
                return _store(
                    response,
                    directory,
                    shown=shown,
                    checksum=checksum,
                    failed=failed,
                    late=lambda: clock() > deadline,
                    most=limits.total_bytes,
                    check=stopped,
                )
        except (HTTPError, OSError) as error:  # what it wraps may hold the login
            raise failed(*_reason(error)) from None

    return answer_of(fetched, check)


@contextmanager
def _opened(url: str, seconds: float, failed: Callable[..., InputError]) -> Iterator[BaseHTTPResponse]:
    """Yield the answer at the end of redirects; its body is not read yet.

    Raises:
        InputError: the URL, or one that a redirect leads to, is not of the kind, or the answer is not 2xx.
    """
    address, login = _address(url, failed)
    for _ in range(_MAX_REDIRECTS + 1):
        with ExitStack() as opened:
            pool = make_pool(client_context(), proxy_for(address, os.environ, plain=True))
            opened.callback(close_now, pool)
            response = send(pool, "GET", address, headers=login, timeout=seconds)
            opened.callback(response.close)  # whatever is left of its body
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or location is None:
                if not 200 <= response.status < 300:
                    raise failed(
                        f"the server answered {response.status} {one_line(response.reason or '', 80)}",
                        f"is the URL right? where it needs a login, {_ELSEWHERE}",
                    )
                yield response
                return
        target = joined(address, location)
        if address.startswith("https:") and not target.lower().startswith("https:"):
            raise failed("the server redirects from https to an unprotected URL")
        address, _ = _address(target, failed)
        login = {}  # it is for the first server only
    raise failed(f"the server redirects more than {_MAX_REDIRECTS} times")


def _address(url: str, failed: Callable[..., InputError]) -> tuple[str, dict[str, str]]:
    """Return what to ask for, and the header of the login in the URL, if there is one."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError:  # which may show the login
        raise failed("its URL is malformed") from None
    if parts.scheme not in ("http", "https"):
        raise failed(f"the server redirects to {one_line(parts.scheme, 20) or 'no URL'}, which is not http")
    if not host:
        raise failed("its URL names no host")
    login = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    bare = parts._replace(netloc=(f"[{host}]" if ":" in host else host) + port, fragment="").geturl()
    # Spaces and the like, decoded by the Dockerfile's quoting, have to travel encoded.
    return quote(bare, safe="%/:=&?~#+!$,;'@()*[]"), login


def _reason(error: Exception) -> tuple[str, str | None]:
    """Say why there is no whole answer, and what to do about it."""
    chain = wrapped(error)
    if (error_of_tls := tls_error(chain)) is not None:
        fault, words = tls_fault(error_of_tls)
        return words, _TLS_REMEDIES.get(fault)
    words = connection_words(chain)
    if is_of_proxy(chain):
        return words, BY_PROXY
    if words == CUT_OFF:
        return words, _AGAIN
    return words, _UNREACHED if any(isinstance(cause, NewConnectionError) for cause in chain) else None


def _store(
    response: BaseHTTPResponse,
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
        while chunk := response.read1(_CHUNK, decode_content=False):
            check()
            digest.update(chunk)
            size += file.write(chunk)
            if size > most:
                raise failed(f"it has more than {counted(most, 'byte')}", _ELSEWHERE)
            if late():
                raise failed("it took too long", _ELSEWHERE)
    found = f"{algorithm}:{digest.hexdigest()}"
    if checksum and found != checksum:
        raise failed(
            f"expected the checksum {checksum}, found {found}",
            "check that the file is the one you mean before you change --checksum",
        )
    return RemoteFile(shown, file_name(shown), Path(name), size, _modified(response.headers), found)


def _modified(headers: HTTPHeaderDict) -> int:
    try:
        return int(parsedate_to_datetime(headers.get("Last-Modified", "")).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError):
        return 0


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
        raise InputError(
            f"the download {path} can't be read: {reason_of(error)}", location=location
        ) from error
