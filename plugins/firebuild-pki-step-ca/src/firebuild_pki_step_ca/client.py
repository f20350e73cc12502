"""The calls of step-ca's HTTP API that a build needs, and what its refusals mean."""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from firebuild_pki import CAError, ProviderContext
from firebuild_pki.http import HTTPAnswer, HTTPClient, TlsFault, client_context, tls_context

from firebuild_pki_step_ca.settings import StepCASettings

PAUSE: Final = 0.5
"""Seconds before the second attempt; doubled for each further one."""

_UNREACHABLE: Final = "is step-ca running, and listening on that address?"
_DONE: Final = frozenset({200, 201})
_PAGE: Final = 100
_MOST_PAGES: Final = 100
_HINTS: Final = {
    TlsFault.NAME: "address has to have a name that is among the dnsNames in step-ca's ca.json",
    TlsFault.TIME: "set the clock of this machine, or that of the server",
    TlsFault.ISSUER: "root has to be the root certificate of this step-ca: step ca root root.pem",
    TlsFault.PLAIN: "step-ca speaks TLS always; is there something else at that address?",
}
# What the server says, in lower case; what that comes down to; what to change.
_MEANINGS: Final = (
    (
        "more than the authorized maximum",
        'the provisioner "{provisioner}" does not allow certificates for so long',
        "raise maxTLSCertDuration among its claims, or shorten bootstrap.build_timeout",
    ),
    (
        "after the expiration of the provisioning credential",
        "the certificate in auth.cert_file ends before the one that was asked for",
        "renew it, or shorten bootstrap.build_timeout",
    ),
    (
        "less than the authorized minimum",
        'the provisioner "{provisioner}" does not allow certificates for so short a time',
        "lower minTLSCertDuration among its claims",
    ),
    (
        "not allowed",
        "a name policy of step-ca does not allow these names",
        "its wildcard is one label, and guests are guest.<build-id>.<name_suffix>: restrict names in the "
        "template of the provisioner",
    ),
    (
        "does not contain the valid",
        "the names in the request are not those that the provisioner allows",
        "a template of the provisioner may replace them",
    ),
)
_UNAUTHORIZED: Final = (
    "compare the clocks of both machines; no proxy may send a request twice; the host in address has to be "
    "among the dnsNames in ca.json; "
    "an X5C provisioner wants a certificate of its roots with the usages digitalSignature and clientAuth"
)


class Refused(CAError):
    """The server understood a request and said no.

    Args:
        answer: what it said.
        doing: what was asked for.
        provisioner: by which provisioner.
    """

    def __init__(self, answer: HTTPAnswer, doing: str, provisioner: str) -> None:
        envelope = answer.json
        said = envelope.get("message") if isinstance(envelope, dict) else None
        self.said = said if isinstance(said, str) else answer.words
        self.status = answer.status
        quoted = f'step-ca: {answer.status} "{self.said[:300]}"'
        retry = answer.is_passing
        for words, what, hint in _MEANINGS:
            if words in self.said.lower():
                super().__init__(f"{what.format(provisioner=provisioner)} ({quoted})", hint=hint)
                return
        message = f"{doing} was refused ({quoted})"
        hint = "its template, or a policy, refuses it; the log of step-ca says more"
        if answer.status == 401:
            message = f'step-ca does not accept the token of the provisioner "{provisioner}" ({quoted})'
            hint = _UNAUTHORIZED
        super().__init__(message, hint=hint, retryable=retry)


@dataclass(frozen=True, slots=True)
class Roots:
    """The CA certificates of the server: PEM, and its clock where it told."""

    anchors_pem: bytes
    intermediates_pem: bytes
    time: datetime | None = field(default=None)


class Client:
    """One step-ca.

    Args:
        settings: address, root, timeout, attempts.
        context: where a proxy is named, whether to try again, and who is told of it.

    Raises:
        CAError: the root cannot be used.
    """

    def __init__(self, settings: StepCASettings, context: ProviderContext) -> None:
        self._settings = settings
        self._http = _http(settings, context, _tls(settings, context))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def audience(self, endpoint: str) -> str:
        """Return the URL that a token for an endpoint names."""
        return f"{self._http.address}/1.0/{endpoint}"

    def roots(self) -> Roots:
        """Ask for the roots and the intermediates."""
        answer = self._get("/roots", "reading the roots")
        anchors = _certificates(answer)
        if not anchors:
            raise CAError("step-ca names no root", hint="does address lead to a step-ca?")
        below = self._http.request("GET", "/intermediates")
        intermediates = _certificates(below) if below.status in _DONE else ()  # older ones do not have it
        return Roots("\n".join(anchors).encode(), "\n".join(intermediates).encode(), answer.date)

    def provisioners(self) -> Iterator[Mapping[str, Any]]:
        """Yield all provisioners, as the server describes them to everybody."""
        cursor = ""
        for _ in range(_MOST_PAGES):
            path = f"/provisioners?limit={_PAGE}&cursor={quote(cursor, safe='')}"
            page = self._get(path, "reading the provisioners").json
            if not isinstance(page, dict):
                break
            for one in page.get("provisioners") or ():
                if isinstance(one, dict):
                    yield one
            cursor = page.get("nextCursor") or ""
            if not cursor or not isinstance(cursor, str):
                return
        raise CAError(
            f"expected the provisioners of a step-ca from {self._settings.address}",
            hint="does address lead to a step-ca?",
        )

    def sign(self, csr_pem: bytes, token: str, seconds: int) -> Sequence[str]:
        """Have a certificate signed.

        Returns:
            The chain as PEM, the leaf first.
        """
        # Not sent again: a token is good for one request, and the first may have come through.
        body = {"csr": csr_pem.decode("ascii"), "ott": token, "notAfter": f"{seconds}s"}
        answer = self._post("sign", body, "the certificate", again=False)
        found = answer.json
        chain = found.get("certChain") if isinstance(found, dict) else None
        if not isinstance(chain, list) or not chain or not all(isinstance(one, str) for one in chain):
            raise CAError("expected a chain of certificates in the answer of step-ca, found none")
        return chain

    def revoke(self, serial: int, token: str) -> None:
        """Revoke a certificate, which is nothing new to the server if it is revoked already."""
        body = {
            "serial": str(serial),
            "ott": token,
            "reasonCode": 0,
            "reason": "build ended",
            "passive": True,
        }
        try:
            self._post("revoke", body, "revoking the certificate", again=False)
        except Refused as error:
            if "already revoked" not in error.said:
                raise

    def _post(self, endpoint: str, body: object, doing: str, *, again: bool) -> HTTPAnswer:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        answer = self._http.request("POST", f"/1.0/{endpoint}", data, headers=headers, again=again)
        return self._accepted(answer, doing)

    def _get(self, path: str, doing: str) -> HTTPAnswer:
        return self._accepted(self._http.request("GET", path), doing)

    def _accepted(self, answer: HTTPAnswer, doing: str) -> HTTPAnswer:
        if answer.status in _DONE:
            return answer
        raise Refused(answer, doing, self._settings.auth.provisioner)


def _http(settings: StepCASettings, context: ProviderContext, tls: ssl.SSLContext) -> HTTPClient:
    return HTTPClient(
        settings.address,
        context=tls,
        environ=context.environ,
        report=context.report,
        timeout=settings.timeout.total_seconds(),
        attempts=settings.attempts if context.patient else 1,
        first_pause=PAUSE,
        hints=_HINTS,
        unreachable=_UNREACHABLE,
    )


def _tls(settings: StepCASettings, context: ProviderContext) -> ssl.SSLContext:
    if settings.root is not None:
        return tls_context(ca_file=settings.root, settings=("root", "", "", ""))
    return client_context(fetch_root(settings, context))


def fetch_root(settings: StepCASettings, context: ProviderContext) -> str:
    """Ask the server for the root with the fingerprint of the settings.

    That is what vouches for it, as nobody vouches for the server as yet. Nothing secret is sent.

    Returns:
        The certificate, PEM.

    Raises:
        CAError: the server does not answer, or with something else.
    """
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    with closing(_http(settings, context, tls)) as client:
        answer = client.request("GET", f"/root/{settings.fingerprint}")
    if answer.is_passing:
        raise Refused(answer, "reading the root", settings.auth.provisioner)
    found = answer.json
    pem, der = str(found.get("ca")) if isinstance(found, dict) else "", b""
    with suppress(ValueError):
        der = ssl.PEM_cert_to_DER_cert(pem)
    if hashlib.sha256(der).hexdigest() != settings.fingerprint:
        raise CAError(
            f"{settings.address} has no root with the fingerprint in root_fingerprint",
            hint="compare it at the server: step certificate fingerprint root_ca.crt",
        )
    return pem


def _certificates(answer: HTTPAnswer) -> tuple[str, ...]:
    found = answer.json
    listed = found.get("crts") if isinstance(found, dict) else None
    return tuple(one for one in listed or () if isinstance(one, str))
