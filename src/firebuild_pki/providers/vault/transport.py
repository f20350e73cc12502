"""One HTTP request to one node. The only module that imports hvac.

`hvac.Client` would fill what is missing from VAULT_TOKEN, ~/.vault-token, VAULT_ADDR, VAULT_CACERT
and VAULT_CLIENT_CERT; its adapter below takes what it is given. Likewise requests: with
``trust_env`` it would send passwords from ~/.netrc and trust REQUESTS_CA_BUNDLE. All that is taken
from the environment here is HTTPS_PROXY with NO_PROXY.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from hvac.adapters import RawAdapter
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from firebuild_pki import addresses
from firebuild_pki.addresses import is_safe
from firebuild_pki.connections import (
    POOLS,
    TlsFault,
    close_now,
    connection_words,
    read_retry_after,
    speaks_tls,
    tls_fault,
    wrapped,
)
from firebuild_pki.providers.vault.settings import base_of

MAX_ANSWER = 4 << 20
"""Bytes; a chain of CA certificates takes a few thousand."""

MAX_REDIRECTS = 3

_PROBE_SECONDS = 2.0  # it is this machine that is asked


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a node gave no usable answer.

    Args:
        address: the node.
        reason: what happened, after the address and a colon.
        lasting: whether trying again is useless.
        hint: what to change.
        retry_after: seconds to wait that the node asked for.
    """

    address: str
    reason: str
    lasting: bool = False
    hint: str | None = None
    retry_after: float = 0.0

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"


class NodeFailed(Exception):
    """A node gave no usable answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def failure_of(address: str, error: Exception) -> Failure:
    """Explain an exception of the HTTP library; what it wraps decides."""
    chain = wrapped(error)
    for cause in chain:
        if isinstance(cause, ssl.SSLError):
            return _tls_failure(address, cause)
        if isinstance(cause, socket.gaierror):
            return _name_fault(address, cause)
    return _connection_failure(address, chain)


def _connection_failure(address: str, chain: list[BaseException]) -> Failure:
    names = {type(cause).__name__ for cause in chain}
    lasting = bool(names & {"InvalidURL", "LocationParseError", "InvalidHeader"})
    return Failure(address, "not a usable address" if lasting else connection_words(chain), lasting=lasting)


_TLS_HINTS = {
    TlsFault.NAME: "use an address that the certificate names, or set tls.server_name to a name in it",
    TlsFault.TIME: "renew Vault's own certificate, or set the clock of this machine",
    TlsFault.ISSUER: "set tls.ca_file to the CA certificate of Vault",
    TlsFault.PLAIN: "is it plain http, or another service?",
    TlsFault.REFUSED: "set tls.cert_file and tls.key_file to a client certificate that Vault accepts",
}


def _tls_failure(address: str, error: ssl.SSLError) -> Failure:
    fault, words = tls_fault(error)
    return Failure(address, words, lasting=fault is not TlsFault.CUT, hint=_TLS_HINTS.get(fault))


def _name_fault(address: str, error: socket.gaierror) -> Failure:
    if error.errno == socket.EAI_AGAIN:
        return Failure(address, "its name cannot be looked up just now")
    return Failure(address, "its name is unknown", lasting=True, hint="look at the setting address")


class Adapter(HTTPAdapter):
    """Uses one TLS context for all connections, whatever requests thinks of certificates.

    Args:
        context: of all connections.
        server_name: name to expect in the certificate, instead of the host.
    """

    def __init__(self, context: ssl.SSLContext, server_name: str | None) -> None:
        self._pool = {"ssl_context": context, "server_hostname": server_name}
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """Make the manager of direct connections."""
        kwargs.update(self._pool)
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """Make the manager of connections through a proxy."""
        manager = super().proxy_manager_for(proxy, **kwargs, **self._pool)
        manager.pool_classes_by_scheme = POOLS
        return manager

    def build_connection_pool_key_attributes(self, request: requests.PreparedRequest, *_: Any) -> Any:
        """Leave TLS to the context."""
        parts = urlsplit(str(request.url))
        return {"scheme": parts.scheme, "host": parts.hostname, "port": parts.port}, {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Leave it to the context: requests would add a bundle of public CAs."""

    def close(self) -> None:
        """Close the sockets now."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            close_now(manager)
        super().close()


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask of any node.

    Args:
        method: GET or POST.
        path: below ``/v1/``.
        body: what to send as JSON.
        token: sent as X-Vault-Token.
        namespace: sent as X-Vault-Namespace.
    """

    method: str
    path: str
    body: Mapping[str, object] | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node said.

    Args:
        address: the node that was asked.
        status: HTTP status.
        content: the JSON object; empty if there was none.
        retry_after: seconds, from the header Retry-After.
        date: time of the node, from the header Date; whole seconds.
    """

    address: str
    status: int
    content: Mapping[str, Any] = field(repr=False)
    retry_after: float = 0.0
    date: datetime | None = None

    @property
    def data(self) -> Mapping[str, Any]:
        """The part ``data``, empty if there is none."""
        data = self.content.get("data")
        return data if isinstance(data, Mapping) else {}

    @property
    def errors(self) -> str:
        """The part ``errors`` in one line."""
        errors = self.content.get("errors")
        texts = [str(one) for one in errors] if isinstance(errors, list) else []
        return "; ".join(" ".join(text.split()) for text in texts)


class Transport:
    """Sends requests over connections that are kept open.

    Args:
        context: TLS of the connections.
        server_name: name to expect in the node's certificate, instead of the host.
        environ: looked at for HTTPS_PROXY and NO_PROXY.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        server_name: str | None,
        environ: Mapping[str, str],
        monotonic: Callable[[], float],
    ) -> None:
        self._environ = environ
        self._monotonic = monotonic
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers["Accept-Encoding"] = "identity"
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, Adapter(context, server_name))

    def send(self, address: str, request: Request, timeout: float) -> Answer:
        """Ask one node, following redirects to its leader.

        Args:
            address: base URL of the node.
            request: what to ask.
            timeout: seconds.

        Raises:
            NodeFailed: there was no complete answer of a Vault server.
        """
        base, path = address, f"v1/{request.path}"
        end = self._monotonic() + timeout
        for _ in range(MAX_REDIRECTS + 1):
            reply = self._attempt(address, base, path, request, end)
            if isinstance(reply, Failure):
                raise NodeFailed(reply)
            if not isinstance(reply, str):
                return _answer(address, *reply)
            base, path = _redirected(address, reply)
        raise NodeFailed(Failure(address, f"it redirects more than {MAX_REDIRECTS} times"))

    def proxy_for(self, address: str) -> str | None:
        """Find the proxy for an address; see `addresses.proxy_for`."""
        return addresses.proxy_for(address, self._environ)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def _attempt(
        self, address: str, base: str, path: str, request: Request, end: float
    ) -> Failure | str | tuple[requests.Response, bytes]:
        # the exceptions of requests hold the request with its token, so none of them gets out
        try:
            reply = self._exchange(base, path, request, end)
        except (requests.RequestException, HTTPError, OSError) as error:
            return self._wants_tls(address, base) or failure_of(address, error)
        if not isinstance(reply, str) and reply[0].status_code == 400:
            return self._wants_tls(address, base) or reply
        return reply

    def _wants_tls(self, address: str, base: str) -> Failure | None:
        """Find out why plain http got no answer: OpenBao says 400 then, and HashiCorp Vault just hangs up."""
        parts = urlsplit(base)
        if parts.scheme != "http" or not speaks_tls(parts.hostname or "", parts.port or 80, _PROBE_SECONDS):
            return None
        hint = f"use https://{parts.netloc}"
        return Failure(address, "this port speaks TLS, not plain http", lasting=True, hint=hint)

    def _exchange(
        self, base: str, path: str, request: Request, end: float
    ) -> str | tuple[requests.Response, bytes]:
        timeout = max(end - self._monotonic(), 0.001)
        proxy = self.proxy_for(base)
        adapter = RawAdapter(
            base_uri=base,
            token=request.token,
            namespace=request.namespace,
            session=self._session,
            allow_redirects=False,
            timeout=timeout,
            proxies={"https": proxy} if proxy else {},
        )
        response = adapter.request(
            request.method, path, raise_exception=False, json=request.body, stream=True
        )
        with closing(response):
            location = response.headers.get("Location")
            if 300 <= response.status_code < 400 and location:
                return urljoin(str(response.url), str(location))
            return response, self._read(base, response, end)

    def _read(self, address: str, response: requests.Response, end: float) -> bytes:
        body = b""
        while chunk := response.raw.read1(1 << 16, decode_content=True):
            body += chunk
            if len(body) > MAX_ANSWER:
                raise NodeFailed(Failure(address, f"the answer is longer than {MAX_ANSWER} bytes", True))
            if self._monotonic() > end:
                raise TimeoutError
        return body


def _redirected(address: str, location: str) -> tuple[str, str]:
    if not is_safe(location):
        target = urlsplit(location)
        raise NodeFailed(
            Failure(
                address,
                f"it redirects to {target.scheme}://{target.hostname}, not https and not this machine",
                lasting=True,
                hint="set api_addr of the nodes to https addresses",
            )
        )
    return base_of(location)


def _answer(address: str, response: requests.Response, body: bytes) -> Answer:
    try:
        content = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        content = None
    if response.status_code == 200 and not body:
        raise NodeFailed(Failure(address, "the answer was cut off"))
    if not isinstance(content, dict):
        if response.ok:
            raise NodeFailed(_strange(address, response))
        content = {}
    return Answer(
        address,
        response.status_code,
        content,
        read_retry_after(response.headers.get("Retry-After")),
        _date(response.headers.get("Date")),
    )


def _strange(address: str, response: requests.Response) -> Failure:
    if "json" in response.headers.get("Content-Type", ""):
        return Failure(address, "the answer was cut off")
    hint = "look at the setting address"
    return Failure(address, "the answer is not from Vault: it is not JSON", lasting=True, hint=hint)


def _date(text: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(text or "").astimezone(UTC)
    except ValueError:
        return None
