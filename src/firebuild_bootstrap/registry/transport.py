"""Requests to one registry: TLS, proxies, redirects, logins, retries, and errors with their remedy.

Secrets go to the registry and to the realm that it names (https, or this machine), never along a redirect to
another host. No exception of the HTTP library gets out, because those hold requests with their headers.
"""

from __future__ import annotations

import errno
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field
from http import HTTPStatus
from typing import Final, Protocol, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from urllib3 import BaseHTTPResponse, PoolManager, Timeout
from urllib3.exceptions import HTTPError

from firebuild_bootstrap.errors import MALFORMED
from firebuild_bootstrap.registry.answers import (
    BEHIND_PROXY,
    SLOW,
    RegistryError,
    error_words,
    is_downgrade,
    origin_of,
    read_challenges,
    shown_url,
)
from firebuild_bootstrap.registry.credentials import HUB, OLD_HUB, Credentials, find_credentials
from firebuild_bootstrap.registry.settings import RegistriesSettings, RegistrySettings, port_problem
from firebuild_bootstrap.registry.tls import missing_issuer, tls_anchors, tls_context
from firebuild_pki.addresses import is_safe, joined, proxy_for, split_url
from firebuild_pki.connections import (
    BY_PROXY,
    LATE,
    NAMELESS,
    REDIRECTS,
    TlsFault,
    close_now,
    connection_words,
    is_of_proxy,
    is_permanent,
    make_pool,
    read_retry_after,
    send,
    tls_error,
    tls_fault,
    wrapped,
)
from firebuild_pki.display import counted, one_line
from firebuild_pki.values import dataclass

T = TypeVar("T")
Response = BaseHTTPResponse

_MAX_ERROR: Final = 64 << 10
_MAX_TOKEN: Final = 256 << 10
_MAX_REDIRECTS: Final = 5
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 60.0
_UNREACHED: Final = (
    "is it running, and its address right? where only a proxy leads there, HTTPS_PROXY names that"
)
_HINTS: Final = {
    LATE: SLOW,
    NAMELESS: "is the name right, and this machine connected to the network?",
}
STRANGER: Final = "is it the registry that answers there? `curl -v` shows what does"
_PROGRESS: Final = 1 << 20
_STORING: Final = 10
# What may be otherwise a moment later (RFC 9110, section 15; 429 is of RFC 6585).
_PASSING: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What requests need of the process around them.

    Args:
        settings: the section `registries`.
        environ: environment variables: proxies, and who logs in.
        anchors: returns the CA certificates of this build's provider, in PEM.
        check: called again and again; what it raises ends the work.
        pause: waits for some seconds.
        clock: seconds that only grow.
    """

    settings: RegistriesSettings
    environ: Mapping[str, str] = field(repr=False)
    anchors: Callable[[], str]
    check: Callable[[], None] = lambda: None
    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    @property
    def seconds(self) -> float:
        """How long an answer may take."""
        return self.settings.timeout.total_seconds()


class Readable(Protocol):
    """What is sent piece by piece."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes, none at the end."""
        ...


@dataclass(frozen=True)
class _Token:
    value: str = field(repr=False)
    until: float


class Registry:
    """One registry, or a mirror of one.

    Args:
        host: as images are named: HOST[:PORT].
        around: what it needs of the process.

    Raises:
        RegistryError: the host has a port that there is not.
    """

    def __init__(self, host: str, around: Surroundings) -> None:
        if problem := port_problem(host):
            raise RegistryError(f"{host}: {problem}", hint="a registry is named as in registry.example:5000")
        self.host = host
        self._around = around
        self._settings: RegistrySettings = around.settings.of(host)
        self.base = self._settings.address or f"https://{OLD_HUB if host == HUB else host}"
        self._pools: dict[tuple[bool, str | None], PoolManager] = {}
        self._lock = threading.Lock()
        self._challenge: Mapping[str, Mapping[str, str]] = {}
        self._tokens: dict[tuple[str, ...], _Token] = {}
        self._found: dict[str, Credentials | None] = {}

    @property
    def seconds(self) -> float:
        """How long an answer may take."""
        return self._around.seconds

    @property
    def chunk_size(self) -> int:
        """Bytes that are sent at a time; 0 for a whole blob."""
        return self._settings.chunk_size or 0

    def close(self) -> None:
        """Close the connections."""
        while self._pools:
            close_now(self._pools.popitem()[1])

    def retry(self, action: Callable[[], T], done: Callable[[], int] = lambda: 0) -> T:
        """Do something, and again after a while if what fails may pass; longer each time (RFC 9110, 10.2.3).

        Args:
            action: may be called several times.
            done: returns how many bytes there are. Whoever gets on, if in pieces, has not failed.

        Raises:
            RegistryError: it failed for good, or too often.
        """
        failures, before = 0, done()
        while True:
            self._around.check()
            try:
                return action()
            except RegistryError as error:
                if done() - before >= _PROGRESS:
                    failures, before = 0, done()
                failures += 1
                if not error.passing or failures >= self._around.settings.attempts:
                    raise
                wait = max(error.after, _FIRST_PAUSE * 2 ** (failures - 1))
                if wait > _LONGEST_PAUSE:  # a limit by the hour is not waited for
                    raise
                self._around.pause(wait)

    @contextmanager
    def send(
        self,
        method: str,
        path: str,
        *,
        scopes: Sequence[str],
        expected: Sequence[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | Readable | None = None,
        repository: str = "",
        what: str,
    ) -> Iterator[Response]:
        """Send one request, log in if that is asked for, and follow redirects of what only reads.

        Args:
            path: from the root, or a URL that the registry gave.
            scopes: what a token has to be good for (https://distribution.github.io/distribution/spec/auth/scope/).
            expected: statuses; all others are errors.
            repository: what logins may be for.
            what: what is asked for, for errors: `the manifest of …`.

        Yields:
            the answer; its body is not read yet.

        Raises:
            RegistryError: there was no answer, or another one.
        """
        call = _Call(method, urljoin(self.base, path), dict(headers or {}), body, what)
        response = self._logged_in(call, tuple(scopes), repository)
        try:
            if response.status not in expected:
                raise self._refused(response, what, call=call)
            yield response
        except BaseException:
            response.close()  # the rest of it would be taken for the next answer
            raise
        self._drained(response)

    def read(self, response: Response, most: int, what: str) -> bytes:
        """Read the body of an answer, of bounded size and within the time of one answer.

        Raises:
            RegistryError: it is longer, or takes longer.
        """
        end = self._around.clock() + self._around.seconds
        body = bytearray()
        try:
            while chunk := response.read1(1 << 16, decode_content=False):
                body += chunk
                if len(body) > most:
                    raise RegistryError(f"{self.host}: {what} has more than {counted(most, 'byte')}")
                if self._around.clock() > end:
                    raise RegistryError(
                        f"{self.host}: {what} did not arrive in time", hint=SLOW, passing=True
                    )
        except (HTTPError, OSError) as error:
            raise self.failed(error, what) from None
        return bytes(body)

    # --- one request ----------------------------------------------------------------------------

    def _logged_in(self, call: _Call, scopes: tuple[str, ...], repository: str) -> Response:
        authorization = self._authorization(scopes, repository, call.what)
        response, url = self._followed(call, authorization)
        # Whoever a redirect leads to names no realm for the logins of this registry.
        if response.status != HTTPStatus.UNAUTHORIZED or not self.is_ours(url):
            return response
        challenge = read_challenges(response.headers.getlist("WWW-Authenticate"))
        body = self._drained(response)
        with self._lock:
            self._challenge = challenge
            self._tokens.pop(scopes, None)
        renewed = self._authorization(scopes, repository, call.what)
        if not renewed:
            raise self._unknown_user(401, body, call.what, self._credentials(repository))
        if call.body is not None and not isinstance(call.body, bytes):  # some of it has been read
            raise RegistryError(
                f"{self.host}: {call.what}: it asked for a new login in the middle of an upload",
                status=401,
                passing=True,
            )
        response, url = self._followed(call, renewed)
        if response.status == HTTPStatus.UNAUTHORIZED and self.is_ours(url):
            body = self._drained(response)
            raise self._unknown_user(401, body, call.what, self._credentials(repository))
        return response

    def _followed(self, call: _Call, authorization: str) -> tuple[Response, str]:
        """Return the answer at the end of redirects, and where that is."""
        url = call.url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._exchange(call, url, authorization if self.is_ours(url) else "")
            if response.status not in REDIRECTS or call.method not in ("GET", "HEAD"):
                return response, url
            location = response.headers.get("Location")
            self._drained(response)
            if not location:
                raise RegistryError(
                    f"{self.host}: {call.what}: it redirects without saying where to",
                    hint=STRANGER,
                )
            target = joined(url, location)
            if is_downgrade(url, target):
                raise RegistryError(
                    f"{self.host}: {call.what}: it redirects to {shown_url(target)}, which is not https",
                    hint=BEHIND_PROXY,
                )
            url = target
        raise RegistryError(
            f"{self.host}: {call.what}: it redirects more than {_MAX_REDIRECTS} times",
            hint=STRANGER,
        )

    def _exchange(self, call: _Call, url: str, authorization: str) -> Response:
        login = {"Authorization": authorization} if authorization else {}
        try:
            response = send(
                self._pool(url),
                call.method,
                url,
                body=call.body,
                headers={**call.headers, **login},
                timeout=Timeout(connect=self._around.seconds, read=self._patience(call)),
            )
        except (HTTPError, OSError, ValueError) as error:
            raise self.failed(error, call.what, url) from None
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding not in ("identity", ""):
            response.close()
            raise RegistryError(
                f"{self.host}: {call.what}: it answers in the encoding {one_line(encoding, 80)}, "
                "which was not asked for",
                hint="a proxy in between changes what the registry sends",
            )
        return response

    def _patience(self, call: _Call) -> float:
        # A registry verifies and stores what it was sent before it answers.
        return self._around.seconds * (1 if call.body is None else _STORING)

    def is_ours(self, url: str) -> bool:
        """Tell whether a URL is of this registry itself."""
        return origin_of(url) == origin_of(self.base)

    def _pool(self, url: str) -> PoolManager:
        """Return the connections for a URL; a client certificate is for the registry and its realm only."""
        ours = urlsplit(url).hostname in {urlsplit(self.base).hostname, *self._realm_hosts()}
        proxy = proxy_for(url, self._around.environ)
        with self._lock:
            pool = self._pools.get((ours, proxy))
            if pool is None:
                pool = self._pools[ours, proxy] = self._new_pool(ours, proxy)
            return pool

    def _new_pool(self, ours: bool, proxy: str | None) -> PoolManager:
        context = tls_context(
            self.host, self._settings, self._anchors(), self._around.environ if ours else None
        )
        return make_pool(context, proxy, several=self._around.settings.connections)

    def _anchors(self) -> str:
        return tls_anchors(self.host, self._settings, self._around.anchors)

    def _drained(self, response: Response) -> bytes:
        """Return what is left of a short answer, after which its connection can be used again."""
        body = bytearray()
        end = self._around.clock() + self._around.seconds
        with suppress(HTTPError, OSError):
            while chunk := response.read1(1 << 14, decode_content=False):
                body += chunk
                if len(body) > _MAX_ERROR or self._around.clock() > end:
                    response.close()
                    break
        response.release_conn()
        return bytes(body[:_MAX_ERROR])

    # --- logins ---------------------------------------------------------------------------------

    def _realm_hosts(self) -> tuple[str, ...]:
        realm = self._challenge.get("bearer", {}).get("realm", "")
        host = split_url(realm).hostname if realm else None
        return (host,) if host else ()

    def _credentials(self, repository: str) -> Credentials | None:
        with self._lock:
            if repository not in self._found:
                found = find_credentials(
                    self.host, repository, self._settings, self._around.environ, self._around.check
                )
                self._found[repository] = found
            return self._found[repository]

    def _authorization(self, scopes: tuple[str, ...], repository: str, what: str) -> str:
        """Return the header for what the registry has asked for so far; empty for none."""
        challenge = self._challenge
        if not challenge:
            return ""
        credentials = self._credentials(repository)
        if credentials is not None and credentials.registry_token:
            return f"Bearer {credentials.registry_token}"
        if "bearer" in challenge:
            return f"Bearer {self._token(challenge['bearer'], scopes, credentials, what)}"
        return credentials.basic if credentials is not None and "basic" in challenge else ""

    def _token(
        self,
        challenge: Mapping[str, str],
        scopes: tuple[str, ...],
        credentials: Credentials | None,
        what: str,
    ) -> str:
        known = self._tokens.get(scopes)
        if known is not None and self._around.clock() < known.until:
            return known.value
        realm = challenge.get("realm", "")
        if not is_safe(realm):
            raise RegistryError(
                f"{self.host}: {what}: it sends logins to {shown_url(realm)}, "
                "which is neither https nor this machine",
                hint="the registry has to name its token service with https",
            )
        fresh = self._ask_for_token(realm, challenge, scopes, credentials, what)
        with self._lock:
            self._tokens[scopes] = fresh
        return fresh.value

    def _ask_for_token(
        self,
        realm: str,
        challenge: Mapping[str, str],
        scopes: tuple[str, ...],
        credentials: Credentials | None,
        what: str,
    ) -> _Token:
        """Get a token (https://distribution.github.io/distribution/spec/auth/token/ and …/oauth/)."""
        service = challenge.get("service", "")
        if credentials is not None and credentials.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": "firebuild",
                "scope": " ".join(scopes),
                "refresh_token": credentials.identity_token,
            }
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            call = _Call("POST", realm, headers, urlencode(form).encode(), what)
            authorization = ""
        else:
            query = [("service", service)] * bool(service) + [("scope", scope) for scope in scopes]
            parts = urlsplit(realm)
            url = parts._replace(query="&".join(filter(None, (parts.query, urlencode(query)))), fragment="")
            call = _Call("GET", url.geturl(), {}, None, what)
            authorization = credentials.basic if credentials is not None else ""
        response = self._exchange(call, call.url, authorization)
        body = self._drained(response) if response.status != 200 else b""
        if response.status in (400, 401, 403):
            raise self._unknown_user(response.status, body, what, credentials, realm)
        if response.status != 200:
            raise self._refused(response, f"{what}: a login at {shown_url(realm)}", body)
        try:
            answer = self.read(response, _MAX_TOKEN, f"the token of {shown_url(realm)}")
        finally:
            response.release_conn()
        return self._read_token(answer, realm)

    def _read_token(self, answer: bytes, realm: str) -> _Token:
        token: object = None
        seconds = 60.0  # "For compatibility with older clients, a token should never be returned with less"
        with suppress(*MALFORMED):
            document = json.loads(answer)
            token = document.get("token") or document.get("access_token")
            seconds = float(document.get("expires_in") or seconds)
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable():
            raise RegistryError(
                f"{self.host}: the answer of {shown_url(realm)} to the login is not a token",
                hint=STRANGER,
            )
        # It must not end on the way.
        return _Token(token, self._around.clock() + max(0.0, min(seconds, 3600.0) - 5.0))

    # --- errors ---------------------------------------------------------------------------------

    def _unknown_user(
        self, status: int, body: bytes, what: str, credentials: Credentials | None, realm: str = ""
    ) -> RegistryError:
        if credentials is None:  # whoever may not see something is not told whether it is there
            why = "it does not exist, or needs a login"
            hint = (
                f"there is no login for {self.host}: `docker login {self.host}` or "
                f"`podman login {self.host}`, or username and password in registries.hosts"
            )
        else:
            why = "it refuses the login" + (f" at {shown_url(realm)}" if realm else "")
            hint = (
                f"the login comes from {one_line(credentials.source)}: is its password right, "
                "and may this user do that there?"
            )
        said = error_words(body) or f"{status} {HTTPStatus(status).phrase}"  # an answer to HEAD has no body
        return RegistryError(f"{self.host}: {what}: {why}: {said}", hint=hint, status=status)

    def _refused(
        self, response: Response, what: str, body: bytes | None = None, call: _Call | None = None
    ) -> RegistryError:
        if body is None:
            body = self._drained(response)
        status = response.status
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = "unknown status"
        said = error_words(body)
        after = read_retry_after(response.headers.get("Retry-After"))
        wait = f"; it asks to wait for {counted(round(after), 'second')}" if after else ""
        return RegistryError(
            f"{self.host}: {what}: it answered {status} {phrase}{f': {said}' if said else ''}{wait}",
            hint=_remedy(status, call),
            status=status,
            passing=status in _PASSING,
            after=after,
        )

    def failed(self, error: Exception, what: str, url: str = "") -> RegistryError:
        """Explain an exception of the HTTP library; what it wraps decides.

        Args:
            url: that was asked, if it was not this registry.
        """
        url = url or self.base
        chain = wrapped(error)
        host = urlsplit(url).netloc
        at = "" if self.is_ours(url) else f" at {one_line(host, 100)}"
        if (error_of_tls := tls_error(chain)) is not None:
            words, hint, passing = self._tls_failure(url, error_of_tls)
            return RegistryError(f"{self.host}: {what}{at}: {words}", hint=hint, passing=passing)
        words = connection_words(chain)
        unreached = _UNREACHED if _is_unreached(chain) else None  # who has answered before is there
        return RegistryError(
            f"{self.host}: {what}{at}: {words}",
            hint=BY_PROXY if is_of_proxy(chain) else _HINTS.get(words, unreached),
            passing=not is_permanent(chain),
        )

    def _tls_failure(self, url: str, error: ssl.SSLError) -> tuple[str, str | None, bool]:
        """Return words, a hint, and whether it may be otherwise a moment later."""
        fault, words = tls_fault(error)
        hint: str | None = None
        entry = f"registries.hosts of {self.host}"
        match fault:
            case TlsFault.NAME:
                hint = (
                    "use a name that the certificate has: "
                    f"`openssl s_client -connect {urlsplit(url).netloc} </dev/null "
                    "| openssl x509 -noout -ext subjectAltName`"
                )
            case TlsFault.TIME:
                hint = "its certificate has to be renewed, or the clock of this machine be set"
            case TlsFault.ISSUER:
                direct = proxy_for(url, self._around.environ) is None
                issuer = missing_issuer(url, self._anchors()) if direct else ""
                of = f" of its issuer {issuer}" if issuer else ""
                hint = f"set ca_file to the certificate{of}, or ca: provider, in {entry}"
                words += f": the issuer {issuer} is missing" if issuer else ""
            case TlsFault.PLAIN if is_safe(plain := f"http://{urlsplit(url).netloc}"):
                hint = f"if it speaks plain http, set address: {plain} in {entry}"
            case TlsFault.PLAIN:
                hint = (
                    "plain http is spoken on this machine only: give the registry a certificate, "
                    "or forward a port of this machine to it (`ssh -L`)"
                )
            case TlsFault.REFUSED:
                hint = f"set cert_file and key_file in {entry} to a client certificate that it accepts"
        return words, hint, fault is TlsFault.CUT


def _is_unreached(chain: Sequence[BaseException]) -> bool:
    """Tell whether there was no connection at all."""
    numbers = {cause.errno for cause in chain if isinstance(cause, OSError)}
    return not numbers.isdisjoint((errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH))


def _remedy(status: int, call: _Call | None) -> str | None:
    """Return the hint for a status that no login and no second try changes."""
    writes = call is not None and call.method not in ("GET", "HEAD")
    if status == HTTPStatus.NOT_FOUND and call is not None and not writes and "/blobs/" in call.url:
        return "what names it is not whole there: push that again, or name a mirror in registries.hosts"
    if status == HTTPStatus.METHOD_NOT_ALLOWED and writes:
        return "nothing can be pushed there: it is read-only, or passes on what another registry has"
    if status == HTTPStatus.CONFLICT and writes:
        return "if that tag may not be changed there, push under another one"
    return _usual_remedy(status)


def _usual_remedy(status: int) -> str | None:
    match status:
        case HTTPStatus.FORBIDDEN:
            return "the login, if there is one, may not do that there, or a proxy in between forbids it"
        case HTTPStatus.NOT_FOUND:
            return "is the name right, and the tag there?"
        case HTTPStatus.TOO_MANY_REQUESTS:
            return "log in, which often raises the limit, or name a mirror in registries.hosts"
        case HTTPStatus.INSUFFICIENT_STORAGE:
            return "the registry has no space left, or what you may use of it"
        case _ if status >= 500:
            return "the registry itself has failed: its log says why; try again later"
    return None


@dataclass(frozen=True)
class _Call:
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | Readable | None = field(repr=False)
    what: str
