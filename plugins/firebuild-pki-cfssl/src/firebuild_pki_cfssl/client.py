"""The two calls of cfssl's HTTP API that signing needs.

The standard library's HTTP client knows no proxies, follows no redirects and reads no environment:
a request goes where the settings say, or nowhere.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from firebuild_pki import CAError

from firebuild_pki_cfssl.refusals import Refused
from firebuild_pki_cfssl.settings import CfsslSettings

MAX_ANSWER = 1 << 20
"""Bytes; a longer answer is not cfssl's."""

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


_NO_TLS = "a server with -mutual-tls-ca wants client_cert and client_key, one without TLS wants http"
_NOT_THERE = "is cfssl running, and listening on that address? one with TLS wants https"


class Client:
    """One cfssl server; every attempt has a connection of its own.

    Args:
        settings: address, TLS, timeout, attempts.
        key: the shared key, decoded.

    Raises:
        CAError: a certificate or key for TLS cannot be used.
    """

    def __init__(self, settings: CfsslSettings, key: bytes) -> None:
        self._settings = settings
        self._key = key
        self._url = urlsplit(settings.address)
        self._tls = _tls(settings) if self._url.scheme == "https" else None

    def info(self, profile: str) -> Answer:
        """Ask for the CA certificate, and for usages and expiry of a profile."""
        return self._call("info", {"label": self._settings.label, "profile": profile}, profile)

    def sign(self, profile: str, request: Mapping[str, object]) -> Answer:
        """Have a certificate signed; the token is the request's HMAC-SHA256 under the shared key."""
        label = {"label": self._settings.label} if self._settings.label else {}
        signed = json.dumps({**request, "profile": profile, **label}).encode()
        token = hmac.digest(self._key, signed, "sha256")
        envelope = {"token": _base64(token), "request": _base64(signed)}
        return self._call("authsign", envelope, profile)

    def _call(self, endpoint: str, body: object, profile: str) -> Answer:
        # Sending a request twice is harmless: nobody has the key of a certificate that got lost.
        for attempt in range(1, self._settings.attempts):
            try:
                return self._attempt(endpoint, body, profile)
            except CAError as error:
                if not error.retryable:
                    raise
            time.sleep(PAUSE * 2 ** (attempt - 1))
        return self._attempt(endpoint, body, profile)

    def _attempt(self, endpoint: str, body: object, profile: str) -> Answer:
        path = f"{self._url.path.rstrip('/')}/api/v1/cfssl/{endpoint}"
        with self._faults_in_words(), closing(self._connection()) as connection:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                text = response.read(MAX_ANSWER)
        envelope = _envelope(text)
        if envelope is None:
            raise self._not_cfssl(endpoint, response.status)
        if envelope["success"] is not True:
            said = "; ".join(_messages(envelope.get("errors"))) or f"HTTP status {response.status}"
            raise Refused(said, profile=profile, label=self._settings.label)
        result = envelope.get("result")
        remarks = tuple(_messages(envelope.get("messages")))
        return Answer(result if isinstance(result, dict) else {}, remarks, _date(response))

    def _connection(self) -> HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        timeout = self._settings.timeout.total_seconds()
        if self._tls is None:
            return HTTPConnection(host, port, timeout=timeout)
        return HTTPSConnection(host, port, timeout=timeout, context=self._tls)

    @contextmanager
    def _faults_in_words(self) -> Iterator[None]:
        address = self._settings.address
        try:
            yield
        except ssl.SSLCertVerificationError as error:
            hint = "ca_file holds the CA of the server's TLS certificate, address a name that is in it"
            message = f"the TLS certificate of {address} is not accepted: {error.verify_message}"
            raise CAError(message, hint=hint) from error
        except ssl.SSLError as error:
            raise CAError(f"no TLS connection to {address}: {error.reason}", hint=_NO_TLS) from error
        except (BrokenPipeError, ConnectionResetError) as error:
            # A server of TLS 1.3 looks at the client's certificate after the client's handshake (RFC 8446,
            # section 2): what is sent meanwhile may meet its closed end before its alert arrives.
            tls = address.startswith("https:")
            what = "no TLS connection to" if tls else "cannot reach"
            hint = _NO_TLS if tls else _NOT_THERE
            raise CAError(f"{what} {address}: {error.strerror}", hint=hint, retryable=True) from error
        except TimeoutError as error:
            seconds = self._settings.timeout.total_seconds()
            raise CAError(f"{address} did not answer within {seconds:g} s", retryable=True) from error
        except OSError as error:
            message = f"cannot reach {address}: {error.strerror or error}"
            raise CAError(message, hint=_NOT_THERE, retryable=True) from error
        except HTTPException as error:
            hint = "address has to lead to cfssl, and a server with TLS wants https"
            raise CAError(f"{address} does not answer in HTTP: {type(error).__name__}", hint=hint) from error

    def _not_cfssl(self, endpoint: str, status: int) -> CAError:
        hint = "address has to lead to cfssl serve or multirootca"
        if status in {429, 502, 503, 504}:
            hint = "it is overloaded, or a proxy in front of it cannot reach it"
        elif status == 404 and endpoint == "authsign":
            hint = "cfssl offers authsign only if one of its profiles has an auth_key"
        message = f"expected an answer of cfssl from {self._settings.address}, found HTTP status {status}"
        return CAError(message, hint=hint, retryable=status in {429, 502, 503, 504})


def _tls(settings: CfsslSettings) -> ssl.SSLContext:
    what = "ca_file"
    try:
        context = ssl.create_default_context(cafile=settings.ca_file and os.path.expanduser(settings.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Not what this Python takes for granted: since 3.13 it refuses authorities without key identifiers,
        # which RFC 5280 wants and many private ones lack, and takes an intermediate as an anchor.
        context.verify_flags = ssl.VERIFY_X509_TRUSTED_FIRST | ssl.VERIFY_X509_PARTIAL_CHAIN
        if settings.client_cert is not None and settings.client_key is not None:
            what = "client_cert and client_key"
            cert, key = map(os.path.expanduser, (settings.client_cert, settings.client_key))
            context.load_cert_chain(cert, key, password=_no_passphrase)
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None) or error.strerror
        raise CAError(f"cannot use {what}: {reason}") from error
    return context


def _no_passphrase() -> str:
    # without this OpenSSL would ask the terminal
    raise CAError("cannot use client_key: it is encrypted", hint="store it without a passphrase")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _envelope(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "success" in found else None


def _messages(found: object) -> Iterator[str]:
    for one in found if isinstance(found, list) else ():
        if isinstance(one, dict) and isinstance(message := one.get("message"), str):
            yield message


def _date(response: HTTPResponse) -> datetime | None:
    try:
        return parsedate_to_datetime(response.headers["Date"]).replace(tzinfo=UTC)  # RFC 9110: in GMT
    except (TypeError, ValueError):
        return None
