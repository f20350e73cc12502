"""Remote files of ADD: fetched by the host, to a file, before anything of the build starts.

https://docs.docker.com/reference/dockerfile/#adding-files-from-a-url
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import ssl
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Final

from firebuild_bootstrap.context.entries import FetchLimits
from firebuild_bootstrap.dockerfile.remote import file_name, redacted
from firebuild_bootstrap.errors import InputError, Location

_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True)
class RemoteFile:
    """A downloaded file.

    Args:
        url: where it came from, without what may be secret.
        name: file name from the URL, empty if it has none.
        path: where its content is now.
        size: bytes.
        mtime_ns: from `Last-Modified`, else 0 (1970), in nanoseconds.
    """

    url: str
    name: str
    path: Path
    size: int
    mtime_ns: int


def fetch(
    url: str,
    directory: Path,
    *,
    checksum: str,
    location: Location | None,
    limits: FetchLimits,
    clock: Callable[[], float] = time.monotonic,
) -> RemoteFile:
    """Download `url` (http or https) to a new file in `directory`.

    Args:
        url: may hold a user name and password for basic authentication.
        directory: an existing directory; the caller removes it with the file.
        checksum: what the content has to hash to, as `ALGORITHM:hex`; empty for anything.
        location: the instruction, for errors.
        limits: how long it may take.
        clock: monotonic seconds.

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
            )
    except urllib.error.HTTPError as error:
        with error:
            raise failed(f"the server answered {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise failed(str(reason) or type(error).__name__) from error


def _store(
    response: http.client.HTTPResponse,
    directory: Path,
    *,
    shown: str,
    checksum: str,
    failed: Callable[..., InputError],
    late: Callable[[], bool],
) -> RemoteFile:
    algorithm = checksum.partition(":")[0] or "sha256"
    digest = hashlib.new(algorithm)
    size = 0
    descriptor, name = tempfile.mkstemp(prefix="download-", dir=directory)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := response.read1(_CHUNK):
            digest.update(chunk)
            size += file.write(chunk)
            if late():
                raise failed("it took too long")
    announced = response.headers.get("Content-Length")
    if announced is not None and announced.isdecimal() and int(announced) != size:
        raise failed(f"the connection broke off after {size} of {announced} bytes")
    if checksum and f"{algorithm}:{digest.hexdigest()}" != checksum:
        raise failed(
            f"expected the checksum {checksum}, found {algorithm}:{digest.hexdigest()}",
            "check that the file is the one you mean before you change --checksum",
        )
    return RemoteFile(shown, file_name(shown), Path(name), size, _modified(response.headers))


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


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    def redirect_request(  # noqa: PLR0917
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            fp.close()
            raise urllib.error.URLError("the server redirects from https to an unprotected URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS only, with the host's proxies: a redirect can't reach files or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_tls()),
        urllib.request.HTTPDefaultErrorHandler(),
        _NoDowngrade(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Not what this Python takes for granted: since 3.13 it refuses authorities without key identifiers,
    # which RFC 5280 wants and many private ones lack, and takes an intermediate as an anchor.
    context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
