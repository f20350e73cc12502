"""HTTP with the server of a CA, for providers: verified TLS, proxies, limits, retries, clear errors.

What a provider asks its backend, and what it makes of the answer, is its own; what is the same for every
backend is here. Nothing is read from the environment but HTTPS_PROXY, ALL_PROXY and NO_PROXY: no password
of ~/.netrc, no bundle of other CAs. No redirect is followed: a request has secrets, and goes where the
settings say.
"""

from __future__ import annotations

import json
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Final
from urllib.parse import urlsplit

from urllib3 import BaseHTTPResponse, PoolManager
from urllib3.exceptions import HTTPError

from firebuild_pki.addresses import is_safe, proxy_for
from firebuild_pki.connections import (
    BY_PROXY,
    LATE,
    TlsFault,
    client_context,
    close_now,
    connection_words,
    is_of_proxy,
    is_permanent,
    make_pool,
    read_anchors,
    read_retry_after,
    send,
    speaks_tls,
    tls_context,
    tls_error,
    tls_fault,
    wrapped,
)
from firebuild_pki.display import counted, one_line
from firebuild_pki.errors import CAError
from firebuild_pki.values import dataclass

__all__ = [
    "HTTPAnswer",
    "HTTPClient",
    "HTTPFailure",
    "TlsFault",
    "audit_headers",
    "backoff",
    "client_context",
    "is_safe",
    "read_anchors",
    "tls_context",
]

PASSING: Final = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that may be others a moment later (RFC 9110, section 15; 429 is of RFC 6585)."""
_LONGEST_PAUSE: Final = 30.0
_WORTH_A_WORD: Final = 2.0  # seconds of waiting
_PIECE: Final = 1 << 16
_PROBE_SECONDS: Final = 2.0  # plain http goes to this machine only
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
"""What a header may have (RFC 9110, section 5.5)."""


def audit_headers(build_id: str, labels: Mapping[str, str]) -> dict[str, str]:
    """Write what a certificate is for as headers, which the log of a server, or a proxy's, can keep.

    Args:
        build_id: that of a `SignRequest`, and so are the labels.

    Returns:
        ``X-Firebuild-Build`` with the build's id, and a header for each label, such as ``X-Firebuild-Tag``.
    """
    told = {**labels, "build": build_id}
    return {f"X-Firebuild-{key.title()}": value for key, value in told.items()}


def backoff(attempt: int, first: float, longest: float = _LONGEST_PAUSE) -> float:
    """Return the seconds to wait after an attempt that failed: doubled each time, up to halved at random.

    Args:
        attempt: how many were made, at least 1.
        first: the longest wait after the first of them.
        longest: that no wait exceeds.
    """
    pause = min(first * 2.0 ** min(attempt - 1, 30), longest)
    return random.uniform(pause / 2, pause)  # noqa: S311 - not for secrets


class HTTPFailure(CAError):
    """There was no complete answer.

    Args:
        message: which address, and why.
        fault: what TLS failed of; None where it did not.
        hint: what to change.
        retryable: whether it may be otherwise a moment later.
        retry_after: seconds to wait before, that the server asked for.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: TlsFault | None = None,
        hint: str | None = None,
        retryable: bool = False,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message, hint=hint, retryable=retryable)
        self.fault = fault
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class HTTPAnswer:
    """What a server answered; its body, which may hold secrets, is in no repr.

    Args:
        status: of HTTP.
        headers: by their names in lower case.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether the status says that all went well."""
        return 200 <= self.status < 300

    @property
    def json(self) -> object:
        """The body as JSON; None where it is none, or nested too deeply."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def words(self) -> str:
        """The body in one harmless line of 300 characters at most, for messages."""
        return one_line(self.body[:4096].decode("utf-8", "replace"), 300)

    @property
    def date(self) -> datetime | None:
        """Time of the server, in whole seconds; None where it does not say."""
        with suppress(TypeError, ValueError, OverflowError):
            found = parsedate_to_datetime(self.headers.get("date", ""))
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)  # RFC 9110: in GMT
        return None

    @property
    def retry_after(self) -> float:
        """Seconds that the server asked to wait; 0 where it did not."""
        return read_retry_after(self.headers.get("retry-after"))

    @property
    def is_passing(self) -> bool:
        """Whether the same request may get another answer a moment later: overload, or a proxy's fault."""
        return self.status in PASSING


class HTTPClient:
    """Asks one server, over connections that are kept open; for one thread, such as a provider's own.

    Args:
        address: URL of the server, to which paths are added: https, or plain http on loopback.
        context: TLS, see `tls_context`; by default the CAs of the operating system are trusted.
        environ: where HTTPS_PROXY, ALL_PROXY and NO_PROXY are, usually `ProviderContext.environ`.
        timeout: seconds for one attempt: to connect, and for all of the answer.
        attempts: how often a request is sent that fails in a way that may pass.
        first_pause: seconds before the second attempt; doubled for each further one, up to halved at random.
        longest: bytes that an answer may have.
        server_name: to expect in the server's certificate, instead of the host of `address`.
        hints: what to change, by what TLS failed of, in the names of the provider's settings.
        unreachable: what to change where there is no connection.
        pause: waits for some seconds.
        clock: seconds that only grow.
        report: told when an attempt took long and another one follows, usually `ProviderContext.report`.

    Raises:
        ValueError: `address` is neither https nor loopback.
    """

    def __init__(
        self,
        address: str,
        *,
        context: ssl.SSLContext | None = None,
        environ: Mapping[str, str],
        timeout: float = 10.0,
        attempts: int = 3,
        first_pause: float = 0.5,
        longest: int = 1 << 20,
        server_name: str | None = None,
        hints: Mapping[TlsFault, str] | None = None,
        unreachable: str | None = None,
        pause: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not is_safe(address):
            raise ValueError("secrets go to https, or to this machine")
        self.address = address.rstrip("/")
        self._context = context
        self._environ = environ
        self._timeout = timeout
        self._attempts = attempts
        self._first_pause = first_pause
        self._longest = longest
        self._server_name = server_name
        self._hints = hints or {}
        self._unreachable = unreachable
        self._pause = pause
        self._clock = clock
        self._report = report
        self._pool: PoolManager | None = None

    def close(self) -> None:
        """Close the connections; may come twice."""
        if self._pool is not None:
            close_now(self._pool)
        self._pool = None

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        again: bool = True,
        timeout: float | None = None,
    ) -> HTTPAnswer:
        """Send a request, and again after a while if what fails may pass; longer each time.

        Args:
            method: GET, POST, PUT and so on.
            path: added to the address; begins with a slash.
            body: what to send.
            headers: more headers; secrets in them show nowhere.
            again: False for what must not be done twice, which is sent once.
            timeout: seconds for each attempt, instead of the client's.

        Returns:
            the answer, whatever its status is; the last one, where several asked to come again.

        Raises:
            HTTPFailure: there was no complete answer, or a header cannot be sent.
            ValueError: the path does not begin with a slash, so it would change the host.
        """
        if not path.startswith("/"):
            raise ValueError("the path of a request begins with a slash")
        for name, value in (headers or {}).items():
            if not _VALUE.fullmatch(value):
                raise HTTPFailure(
                    f"{self.address}: the header {name} (not shown) has a line break, or a character that "
                    "HTTP cannot carry",
                    hint="look at the secret or setting that it is made of",
                )
        seconds = self._timeout if timeout is None else timeout
        last = self._attempts if again else 1
        begun, silent = self._clock(), True
        for attempt in range(1, last):
            try:
                answer = self._attempt(method, path, body, headers or {}, seconds)
            except HTTPFailure as error:
                if not error.retryable:
                    raise
                wait, found = 0.0, error.message
            else:
                wait, found = answer.retry_after, f"{self.address}: status {answer.status}"
                if not answer.is_passing or wait > _LONGEST_PAUSE:  # a limit by the hour is not waited for
                    return answer
            wait = max(wait, backoff(attempt, self._first_pause))
            if silent and self._clock() - begun + wait >= _WORTH_A_WORD:
                silent = False
                self._report(f"no usable answer from {found}; trying up to {counted(last, 'time')}")
            self._pause(wait)
        return self._attempt(method, path, body, headers or {}, seconds)

    def _attempt(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], seconds: float
    ) -> HTTPAnswer:
        end = self._clock() + seconds
        try:
            address = f"{self.address}{path}"
            response = send(self._connected(), method, address, headers=headers, body=body, timeout=seconds)
            try:
                data = self._read(response, end)
            except BaseException:
                response.close()  # the rest of it would be taken for the next answer
                raise
            response.release_conn()
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            raise self._failed(error) from None
        if response.status == 400 and (failure := self._wants_tls()):  # servers in Go say it with this
            raise failure
        return HTTPAnswer(response.status, {k.lower(): v for k, v in response.headers.items()}, data)

    def _read(self, response: BaseHTTPResponse, end: float) -> bytes:
        body = bytearray()
        while chunk := response.read1(_PIECE, decode_content=False):
            body += chunk
            if len(body) > self._longest:
                raise HTTPFailure(
                    f"{self.address}: the answer is longer than {counted(self._longest, 'byte')}"
                )
            if self._clock() > end:
                raise TimeoutError
        return bytes(body)

    def _connected(self) -> PoolManager:
        if self._pool is None:
            proxy = proxy_for(self.address, self._environ)
            context = self._context
            if context is None and self.address.startswith("https"):  # reading the system's CAs takes 20 ms
                context = tls_context()
            self._pool = make_pool(context, proxy, server_name=self._server_name)
        return self._pool

    def _failed(self, error: Exception) -> HTTPFailure:
        """Explain an exception of the HTTP library; what it wraps decides."""
        chain = wrapped(error)
        if (refused_by := tls_error(chain)) is not None:
            fault, words = tls_fault(refused_by)
            hint = self._hints.get(fault)
            if fault is TlsFault.CUT:  # also how a server that refused looks to a write; see below
                hint = hint or self._hints.get(TlsFault.REFUSED)
            return HTTPFailure(
                f"{self.address}: {words}", fault=fault, hint=hint, retryable=fault is TlsFault.CUT
            )
        words = connection_words(chain)
        permanent, of_proxy = is_permanent(chain), is_of_proxy(chain)
        if permanent or of_proxy:
            hint = BY_PROXY if of_proxy else self._unreachable
            return HTTPFailure(f"{self.address}: {words}", hint=hint, retryable=not permanent)
        if words != LATE and (failure := self._wants_tls()):  # HashiCorp Vault just hangs up
            return failure
        hint, refused = self._unreachable, None
        if urlsplit(self.address).scheme == "https" and any(
            isinstance(cause, BrokenPipeError | ConnectionResetError) for cause in chain
        ):
            # A server of TLS 1.3 looks at the client's certificate after the client's handshake (RFC 8446,
            # section 2): what is sent meanwhile may meet its closed end before its alert arrives.
            hint, refused = self._hints.get(TlsFault.REFUSED, hint), TlsFault.REFUSED
        return HTTPFailure(f"{self.address}: {words}", fault=refused, hint=hint, retryable=True)

    def _wants_tls(self) -> HTTPFailure | None:
        """Find out whether plain http gets no answer because the port speaks TLS."""
        parts = urlsplit(self.address)
        if parts.scheme != "http" or not speaks_tls(parts.hostname or "", parts.port or 80, _PROBE_SECONDS):
            return None
        words = "this port speaks TLS, not plain http"
        return HTTPFailure(f"{self.address}: {words}", hint=f"use https://{parts.netloc}")
