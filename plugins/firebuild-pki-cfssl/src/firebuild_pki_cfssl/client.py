"""The two calls of cfssl's HTTP API that signing needs."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography import x509
from firebuild_pki import CAError, ProviderContext
from firebuild_pki.http import HTTPAnswer, HTTPClient, TlsFault, tls_context

from firebuild_pki_cfssl.refusals import Refused
from firebuild_pki_cfssl.settings import CfsslSettings

PAUSE = 0.5
"""Seconds before the second attempt; doubled for each further one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its result, its remarks, and the server's clock where it told."""

    result: Mapping[str, Any]
    messages: tuple[str, ...]
    time: datetime | None

    def certificate(self) -> bytes:
        """Take the certificate out of the result, as PEM."""
        pem = self.result.get("certificate")
        try:
            x509.load_pem_x509_certificate(str(pem).encode())
        except ValueError:
            raise CAError("expected a certificate in the answer of cfssl, found none") from None
        return str(pem).encode()


_HINTS = {
    TlsFault.NAME: "address has to have a name that is in the server's certificate",
    TlsFault.TIME: "renew the server's certificate, or set the clock of this machine",
    TlsFault.ISSUER: "ca_file holds the CA of the server's TLS certificate",
    TlsFault.PLAIN: "one without TLS wants http",
    TlsFault.REFUSED: "a server with -mutual-tls-ca wants client_cert and client_key",
}


class Client:
    """One cfssl server.

    Args:
        settings: address, TLS, timeout, attempts.
        key: the shared key, decoded.
        context: where a proxy is named, whether to try again, and who is told of it.

    Raises:
        CAError: a certificate or key for TLS cannot be used.
    """

    def __init__(self, settings: CfsslSettings, key: bytes, context: ProviderContext) -> None:
        self._settings = settings
        self._key = key
        self._http = HTTPClient(
            settings.address,
            context=tls_context(
                ca_file=settings.ca_file,
                cert_file=settings.client_cert,
                key_file=settings.client_key,
                settings=("ca_file", "client_cert", "client_key", ""),
            ),
            environ=context.environ,
            report=context.report,
            timeout=settings.timeout.total_seconds(),
            attempts=settings.attempts if context.patient else 1,
            first_pause=PAUSE,
            hints=_HINTS,
            unreachable="is cfssl running, and listening on that address? one with TLS wants https",
        )

    def info(self, profile: str) -> Answer:
        """Ask for the CA certificate, and for usages and expiry of a profile."""
        return self._call("info", {"label": self._settings.label, "profile": profile}, profile)

    def sign(
        self, profile: str, request: Mapping[str, object], headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Have a certificate signed; the token is the request's HMAC-SHA256 under the shared key.

        Args:
            profile: of the server's configuration.
            request: what cfssl knows as a sign request.
            headers: for the log of a proxy in front of it; cfssl itself keeps none.
        """
        label = {"label": self._settings.label} if self._settings.label else {}
        signed = json.dumps({**request, "profile": profile, **label}).encode()
        token = hmac.digest(self._key, signed, "sha256")
        envelope = {"token": _base64(token), "request": _base64(signed)}
        return self._call("authsign", envelope, profile, headers)

    def close(self) -> None:
        """Forget the key, and close the connection."""
        self._key = b""
        self._http.close()

    def _call(
        self, endpoint: str, body: object, profile: str, headers: Mapping[str, str] | None = None
    ) -> Answer:
        # Sending a request twice is harmless: nobody has the key of a certificate that got lost.
        answer = self._http.request(
            "POST",
            f"/api/v1/cfssl/{endpoint}",
            json.dumps(body).encode(),
            headers={**(headers or {}), "Content-Type": "application/json"},
        )
        envelope = answer.json
        if not isinstance(envelope, dict) or "success" not in envelope:
            raise self._not_cfssl(endpoint, answer)
        if envelope["success"] is not True:
            said = "; ".join(_messages(envelope.get("errors"))) or f"HTTP status {answer.status}"
            raise Refused(said, profile=profile, label=self._settings.label)
        result = envelope.get("result")
        remarks = tuple(_messages(envelope.get("messages")))
        return Answer(result if isinstance(result, dict) else {}, remarks, answer.date)

    def _not_cfssl(self, endpoint: str, answer: HTTPAnswer) -> CAError:
        hint = "address has to lead to cfssl serve or multirootca"
        if answer.is_passing:
            hint = "it is overloaded, or a proxy in front of it cannot reach it"
        elif answer.status == 404 and endpoint == "authsign":
            hint = "cfssl offers authsign only if one of its profiles has an auth_key"
        message = (
            f"expected an answer of cfssl from {self._settings.address}, found HTTP status {answer.status}"
        )
        return CAError(message, hint=hint, retryable=answer.is_passing)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _messages(found: object) -> Iterator[str]:
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and isinstance(message := one.get("message"), str):
            yield message
