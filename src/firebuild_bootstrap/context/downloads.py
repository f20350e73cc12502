"""Sources of ADD that are downloaded, by HTTP or HTTPS.

One is complete on the host before anything of the build starts. Few builds have one, so this module is
imported when it is needed. https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import ssl
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, Final

from firebuild_bootstrap.context.archive import Archive, is_archive
from firebuild_bootstrap.context.entries import Entry, FetchLimits, Group, checked
from firebuild_bootstrap.dockerfile.operations import file_name, redacted
from firebuild_bootstrap.errors import InputError, Location
from firebuild_bootstrap.layers import tar
from firebuild_bootstrap.values import dataclass
from firebuild_pki.addresses import proxy_for
from firebuild_pki.connections import BoundedResponse, UnusableProxy, client_context, proxy_parts
from firebuild_pki.display import counted

_CHUNK: Final = 1024 * 1024
_ELSEWHERE: Final = "download it into the build context, and COPY it"
_AGAIN: Final = f"try again, or {_ELSEWHERE}"


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
