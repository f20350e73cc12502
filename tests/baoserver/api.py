"""A small client of the HTTP API, for setting up what a test needs; knows nothing of the provider."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests


class ApiError(Exception):
    """The server answered with an error.

    Args:
        status: HTTP status.
        text: the server's words.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status


@dataclass(frozen=True)
class Api:
    """One token's view of one server.

    Args:
        address: for example ``http://127.0.0.1:8200``.
        token: sent with every request; empty for none.
        namespace: path of the namespace; empty for the root namespace.
        ca_file: PEM file that the server's certificate is checked against.
        client_certificate: PEM files of a certificate and its key, for cert auth.
        timeout: seconds for one request.
    """

    address: str
    token: str = field(default="", repr=False)
    namespace: str = ""
    ca_file: Path | None = None
    client_certificate: tuple[Path, Path] | None = None
    timeout: float = 20

    def with_token(self, token: str) -> Api:
        """Return the same view with another token."""
        return replace(self, token=token)

    def within(self, namespace: str) -> Api:
        """Return the same view of a namespace, given by its full path."""
        return replace(self, namespace=namespace)

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        """Send one request to ``/v1/<path>`` and return the answer, whatever it is.

        Raises:
            requests.RequestException: there was no answer.
        """
        headers = {"X-Vault-Request": "true"}
        if self.token:
            headers["X-Vault-Token"] = self.token
        if self.namespace:
            headers["X-Vault-Namespace"] = self.namespace
        with requests.Session() as session:
            session.trust_env = False
            session.verify = str(self.ca_file) if self.ca_file else True
            if self.client_certificate:
                session.cert = tuple(map(str, self.client_certificate))  # type: ignore[assignment]
            url = f"{self.address}/v1/{path}"
            return session.request(method, url, json=body, headers=headers, timeout=self.timeout)

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send one request and return the JSON object of the answer; empty if it has no body.

        Raises:
            ApiError: the status is not one of success.
        """
        answer = self.request(method, path, body)
        if not answer.ok:
            raise ApiError(answer.status_code, f"{method} {path}: {answer.text.strip()}")
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found

    def read(self, path: str) -> dict[str, Any]:
        """GET; return ``data`` of the answer."""
        found: dict[str, Any] = self.call("GET", path).get("data") or {}
        return found

    def write(self, path: str, **body: Any) -> dict[str, Any]:
        """POST; return ``data`` of the answer."""
        found: dict[str, Any] = self.call("POST", path, body).get("data") or {}
        return found

    def delete(self, path: str) -> None:
        """DELETE."""
        self.call("DELETE", path)

    def make_namespace(self, name: str) -> Api:
        """Make a namespace below this one and return the view of it."""
        self.call("POST", f"sys/namespaces/{name}", {})
        return self.within(f"{self.namespace}/{name}".strip("/"))
