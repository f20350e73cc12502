"""One request to one node, in the words of Vault. The only module that imports hvac.

`hvac.Client` would fill what is missing from VAULT_TOKEN, ~/.vault-token, VAULT_ADDR, VAULT_CACERT
and VAULT_CLIENT_CERT; its adapter below takes what it is given, and writes the headers of Vault. The
connection is an `HTTPClient`, as of all backends that speak HTTP.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from dataclasses import field
from datetime import datetime
from json import dumps
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

from hvac.adapters import RawAdapter

from firebuild_pki.http import HTTPAnswer, HTTPClient, HTTPFailure, TlsFault, is_safe
from firebuild_pki.providers.vault.settings import base_of
from firebuild_pki.values import dataclass

MAX_ANSWER = 4 << 20
"""Bytes; a chain of CA certificates takes a few thousand."""

MAX_REDIRECTS = 3

_HINTS: Final = {
    TlsFault.NAME: "use an address that the certificate names, or set tls.server_name to a name in it",
    TlsFault.TIME: "renew Vault's own certificate, or set the clock of this machine",
    TlsFault.ISSUER: "set tls.ca_file to the CA certificate of Vault",
    TlsFault.PLAIN: "is it plain http, or another service?",
    TlsFault.REFUSED: "set tls.cert_file and tls.key_file to a client certificate that Vault accepts",
}


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask of any node.

    Args:
        method: GET or POST.
        path: below ``/v1/``.
        body: what to send as JSON.
        token: sent as X-Vault-Token.
        namespace: sent as X-Vault-Namespace.
        headers: others, for the server's audit log.
    """

    method: str
    path: str
    body: Mapping[str, object] | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    namespace: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)


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


class _Session:
    """What hvac's adapter sends through, not a session of requests: one attempt of an `HTTPClient`."""

    cert = verify = proxies = None  # which hvac asks for; they are the client's

    def __init__(self, client: HTTPClient) -> None:
        self._client = client

    def request(
        self,
        *,
        method: str,
        url: str,
        headers: Mapping[str, str],
        json: Mapping[str, object] | None,
        timeout: float,
        **_: object,
    ) -> HTTPAnswer:
        body = None if json is None else dumps(json).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        path = url.removeprefix(self._client.address)
        return self._client.request(
            method, path, body, headers={**headers, **kind}, again=False, timeout=timeout
        )


class Transport:
    """Sends requests over connections that are kept open, to each node its own.

    Args:
        context: TLS of the connections; None for the CAs of the system.
        server_name: name to expect in the node's certificate, instead of the host.
        environ: looked at for HTTPS_PROXY and NO_PROXY.
        monotonic: seconds that only grow.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None,
        server_name: str | None,
        environ: Mapping[str, str],
        monotonic: Callable[[], float],
    ) -> None:
        self._context = context
        self._server_name = server_name
        self._environ = environ
        self._monotonic = monotonic
        self._clients: dict[str, HTTPClient] = {}

    def send(self, address: str, request: Request, timeout: float) -> Answer:
        """Ask one node, following redirects to its leader.

        Args:
            address: base URL of the node.
            request: what to ask.
            timeout: seconds.

        Raises:
            HTTPFailure: there was no complete answer of a Vault server.
        """
        base, path = address, f"v1/{request.path}"
        end = self._monotonic() + timeout
        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = self._exchange(base, path, request, max(end - self._monotonic(), 0.001))
            except HTTPFailure as error:
                if base != address:  # the node that was asked is the one that people know
                    error.message = f"{address}: it redirects to {error.message}"
                raise
            location = answer.headers.get("location")
            if not (300 <= answer.status < 400 and location):
                return _read(address, answer)
            base, path = _redirected(address, urljoin(f"{base}/{path}", location))
        raise HTTPFailure(f"{address}: it redirects more than {MAX_REDIRECTS} times", retryable=True)

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def _exchange(self, base: str, path: str, request: Request, timeout: float) -> HTTPAnswer:
        adapter = RawAdapter(
            base_uri=base,
            token=request.token,
            namespace=request.namespace,
            session=_Session(self._client(base)),
            allow_redirects=False,
            timeout=timeout,
        )
        answer: HTTPAnswer = adapter.request(
            request.method, path, dict(request.headers), raise_exception=False, json=request.body
        )
        return answer

    def _client(self, base: str) -> HTTPClient:
        if base not in self._clients:
            self._clients[base] = HTTPClient(
                base,
                context=self._context,
                environ=self._environ,
                longest=MAX_ANSWER,
                server_name=self._server_name,
                hints=_HINTS,
                clock=self._monotonic,
            )
        return self._clients[base]


def _redirected(address: str, location: str) -> tuple[str, str]:
    if is_safe(location):
        return base_of(location)
    target = urlsplit(location)
    raise HTTPFailure(
        f"{address}: it redirects to {target.scheme}://{target.hostname}, not https and not this machine",
        hint="set api_addr of the nodes to https addresses",
    )


def _read(address: str, answer: HTTPAnswer) -> Answer:
    content = answer.json if answer.body.strip() else {}
    if (answer.status == 200 and not answer.body) or (
        answer.ok and not isinstance(content, dict) and "json" in answer.headers.get("content-type", "")
    ):
        raise HTTPFailure(f"{address}: the answer was cut off", retryable=True)
    if not isinstance(content, dict):
        if answer.ok:
            raise HTTPFailure(
                f"{address}: the answer is not from Vault: it is not JSON", hint="look at the setting address"
            )
        content = {}
    return Answer(address, answer.status, content, answer.retry_after, answer.date)
